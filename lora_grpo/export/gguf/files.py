"""GGUF files, written and proven: a merged model in several types, or the LoRA adapter alone, which
llama.cpp puts on the base's file (`--lora`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_grpo.export.config import plain_name
from lora_grpo.export.gguf.llamacpp import HOW_TO_INSTALL, can_quantize, quantize_file
from lora_grpo.export.gguf.proof import prove_file
from lora_grpo.export.gguf.quants import QUANTS
from lora_grpo.export.gguf.tokenizer import describe_tokenizer
from lora_grpo.export.gguf.write import (
    GGUFModel,
    check_config,
    name_map,
    permute,
    read_model,
    write_adapter,
    write_model,
)
from lora_grpo.export.source import SYSTEM_PROMPT, ExportedFormat, Say, Source
from lora_grpo.machine.files import read_json
from lora_grpo.merge.deltas import Delta
from lora_grpo.policy.adapter import CONFIG
from lora_grpo.policy.base import declared_end_ids, read_config, read_tokenizer
from lora_grpo.proof.checks import Check
from lora_grpo.proof.reference import Reference

ASKING = ("--jinja", "-sysf", Path(SYSTEM_PROMPT), "--temp", "0")


def check_gguf(source: Source, quants: tuple[str, ...]) -> None:
    """Raise a ValueError for a model that GGUF is not written of here, or a type that llama.cpp
    would have to make and cannot."""
    config = read_config(source.merged)
    check_config(config, source.merged)
    tokenizer = read_tokenizer(source.tokenizer_folder)
    ends = declared_end_ids(source.merged, tokenizer)
    describe_tokenizer(tokenizer, config.vocab_size, ends)
    needing = [quant for quant in quants if QUANTS[quant].needs_llamacpp]
    if needing and not can_quantize():
        raise ValueError(
            f"--quant {' '.join(needing)} is made by llama.cpp, which is not here: {HOW_TO_INSTALL}"
        )


def make_file(path: Path, folder: Path, name: str, quant: str) -> GGUFModel:
    """Write one GGUF file of a 16-bit model, by llama.cpp where the type asks for it."""
    model, tokenizer = read_model(folder), read_tokenizer(folder)
    ends = declared_end_ids(folder, tokenizer)
    vocabulary = describe_tokenizer(tokenizer, model.config.vocab_size, ends)
    if not QUANTS[quant].needs_llamacpp:
        write_model(path, model, vocabulary, quant, name)
        return model
    exact = path.with_name(f".{path.name}.16bit")
    in_float16 = {tensor.dtype for tensor in model.tensors.values()} == {"F16"}
    write_model(exact, model, vocabulary, "f16" if in_float16 else "bf16", name)
    quantize_file(exact, path, quant)
    exact.unlink()
    return model


def name_file(source: Source, quant: str) -> str:
    """Return a file's name, in the way of the Hub's GGUF repositories."""
    return f"{plain_name(source.name)}-{quant.upper()}.gguf"


def write_gguf(
    source: Source, folder: Path, quants: tuple[str, ...], reference: Reference, say: Say
) -> ExportedFormat:
    """Write and prove a file for each type.

    Raises:
        ValueError: a weight does not fit a type.
        RuntimeError: llama.cpp did not quantise.
    """
    checks, figures, commands = [], {}, []
    for quant in quants:
        path = folder / name_file(source, quant)
        model = make_file(path, source.merged, source.name, quant)
        say(f"proving {path.name}")
        proof = prove_file(path, source.merged, model, quant, reference)
        checks += [replace(check, name=f"{quant} {check.name}") for check in proof.checks]
        figures[quant] = proof.figures
        commands.append(("llama-cli", "-m", Path(path.name), *ASKING))
    return ExportedFormat(tuple(checks), figures, tuple(commands))


# Two float32 products of the same matrices, in another order of scaling.
SLACK = 2.0**-18


def write_gguf_adapter(
    source: Source, folder: Path, reference: Reference, say: Say
) -> ExportedFormat:
    """Write the adapter's file, and prove that it adds what PEFT's adapter adds.

    Raises:
        ValueError: it changes a weight that GGUF has no name for.
    """
    from lora_grpo.export.gguf.llamacpp import is_installed

    deltas, config = source.plan.deltas, read_config(source.plan.base_folder)
    alpha = read_json(source.plan.record.folder / CONFIG)["lora_alpha"]
    path = folder / f"{plain_name(source.name)}-lora-F32.gguf"
    write_adapter(path, config, deltas, alpha, source.name)
    say(f"proving {path.name}")
    checks, figures = [check_deltas(path, config, deltas)], {"bytes": path.stat().st_size}
    if is_installed():
        found, measured = run_on_base(path, source, reference)
        checks += found
        figures |= measured
    command = ("llama-cli", "-m", "BASE.gguf", "--lora", Path(path.name), *ASKING)
    return ExportedFormat(tuple(checks), figures, (command,))


def check_deltas(path: Path, config: Any, deltas: dict[str, Delta]) -> Check:
    """Read the file back, and compare what each pair adds with what PEFT's formula adds."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    names = {
        name_map(config).get_name(name, try_suffixes=(".weight",)): delta
        for name, delta in deltas.items()
    }
    expected = {f"{name}.lora_{side}" for name in names for side in "ab"}
    faults = [f"{name} is in one of the two only" for name in sorted(expected ^ stored.keys())]
    for name, delta in names.items():
        a, b = stored.get(f"{name}.lora_a"), stored.get(f"{name}.lora_b")
        if a is None or b is None:
            continue
        wanted = permute(config, name, delta.compute().numpy())
        error = np.abs(np.float32(alpha / a.shape[0]) * (b @ a) - wanted).max()
        if not error <= SLACK * np.abs(wanted).max():
            faults.append(f"{name} adds something else, by up to {error:.3g}")
    detail = "; ".join(faults[:3]) or f"{len(names)} pairs add what PEFT's add"
    return Check("deltas", not faults, detail)


def run_on_base(
    path: Path, source: Source, reference: Reference
) -> tuple[list[Check], dict[str, Any]]:
    """Run base and adapter in llama.cpp, and compare with PEFT's base + adapter in float32."""
    from lora_grpo.export.gguf.llamacpp import prove_in_llamacpp
    from lora_grpo.policy.base import Placement, load_adapter, load_base
    from lora_grpo.proof.distance import collect_logits

    base = path.with_name(".base.gguf")
    make_file(base, source.plan.base_folder, source.name, "bf16")
    plain = load_base(source.plan.base_folder, Placement("cpu", "float32"), load_in_4bit=False)
    policy = load_adapter(plain, source.plan.record.folder).eval()
    expected: list[torch.Tensor] = list(collect_logits(policy, reference.sequences))
    try:
        return prove_in_llamacpp(base, source.merged, reference, expected, "bf16", lora=path)
    finally:
        base.unlink()
