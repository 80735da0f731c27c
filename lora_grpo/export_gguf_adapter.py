"""The LoRA adapter alone as GGUF, which llama.cpp puts on the base's GGUF file: `--lora`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_grpo.adapter import read_json
from lora_grpo.export_config import plain_name
from lora_grpo.export_gguf import ASKING
from lora_grpo.export_reference import Reference
from lora_grpo.export_source import Outcome, Source
from lora_grpo.gguf_model import check_config, name_map, permute
from lora_grpo.gguf_write import write_adapter
from lora_grpo.lora_delta import CONFIG, Delta, read_deltas
from lora_grpo.merge_checks import Check
from lora_grpo.merge_inputs import read_base
from lora_grpo.model import read_config

# Two float32 products of the same matrices, in another order of scaling.
SLACK = 2.0**-18


def write_gguf_adapter(
    source: Source, folder: Path, seen: Reference, report: Callable[[str], None]
) -> Outcome:
    """Write the adapter's file, and prove that it adds what PEFT's adapter adds.

    Raises:
        ValueError: it changes a weight that GGUF has no name for.
    """
    from lora_grpo.llamacpp import is_installed

    adapter = read_json(source.adapter_dir / CONFIG)
    deltas = read_deltas(source.adapter_dir, adapter, read_base(source.base))
    config = read_config(source.base)
    check_config(config, source.base)
    path = folder / f"{plain_name(source.name)}-lora-F32.gguf"
    write_adapter(path, config, deltas, adapter["lora_alpha"], source.name)
    report(f"proving {path.name}")
    checks, figures = [check_deltas(path, config, deltas)], {"bytes": path.stat().st_size}
    if is_installed():
        found, measured = run_on_base(path, source, seen)
        checks += found
        figures |= measured
    command = ("llama-cli", "-m", "BASE.gguf", "--lora", Path(path.name), *ASKING)
    return Outcome(tuple(checks), figures, (command,))


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


def run_on_base(path: Path, source: Source, seen: Reference) -> tuple[list[Check], dict[str, Any]]:
    """Run base and adapter in llama.cpp, and compare with PEFT's base + adapter in float32."""
    from lora_grpo.export_gguf import make_file
    from lora_grpo.llamacpp_proof import prove_in_llamacpp
    from lora_grpo.logit_distance import collect_logits
    from lora_grpo.model import Placement, load_adapter, load_base

    base = path.with_name(".base.gguf")
    make_file(base, replace(source, merged=source.base), "bf16")
    policy = load_adapter(
        load_base(source.base, Placement("cpu", "float32"), load_in_4bit=False), source.adapter_dir
    ).eval()
    expected: list[torch.Tensor] = list(collect_logits(policy, seen.sequences))
    try:
        return prove_in_llamacpp(base, source.merged, seen, expected, "bf16", lora=path)
    finally:
        base.unlink()
