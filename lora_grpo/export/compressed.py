"""Folders in the format compressed-tensors, written by llm-compressor, which vLLM serves: 8-bit
floats, 8-bit integers, or 4-bit weights alone.

At 8 bits the weights are rounded to nearest, without calibration data; at 4 bits GPTQ chooses them
on the run's own prompts. Activations are scaled as they come, so they need no data. Embeddings and
output layer stay in 16 bits.
"""

from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.export.reload import describe_difference, prove_folder
from lora_grpo.export.source import HERE, ExportedFormat, Say, Source
from lora_grpo.machine.files import read_json, read_jsonl
from lora_grpo.policy.adapter import COMPLETIONS
from lora_grpo.proof.distance import continue_greedily
from lora_grpo.proof.reference import Reference, quiet_transformers, render_question

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUPS = (128, 64, 32)
NUM_ROWS, MAX_NEW_TOKENS = 128, 64
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scheme:
    """A type of weights in compressed-tensors' words, and how far it may take a model.

    `largest_error` is of a weight as a whole, relative to its norm; `largest_kl` of the logits, in
    nats per token. Both are several times what was seen.
    """

    format: str
    bits: int
    type: str
    largest_error: float
    largest_kl: float
    calibrated: bool = False


SCHEMES = {
    "fp8": Scheme("float-quantized", 8, "float", 0.1, 0.5),
    "int8": Scheme("int-quantized", 8, "int", 0.1, 0.5),
    "w4a16": Scheme("pack-quantized", 4, "int", 0.5, 1.0, calibrated=True),
}


def check_compressed(folder: Path, name: str) -> None:
    """Raise a ValueError where llm-compressor is not installed or a row is no whole number of
    groups."""
    if find_spec("llmcompressor") is None:
        raise ValueError(
            f"--format {name} is written by llm-compressor, which is not installed: use an "
            "environment with it (pip install -r requirements-llmcompressor.txt)"
        )
    if SCHEMES[name].calibrated:
        choose_group(folder)


def choose_group(folder: Path) -> int:
    """Return the largest group of weights that divides every row of a linear layer.

    Raises:
        ValueError: none does.
    """
    config = read_json(folder / "config.json")
    heads, hidden = config.get("num_attention_heads", 1), config["hidden_size"]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": config.get("intermediate_size", hidden),
        "attention heads together": heads * (config.get("head_dim") or hidden // heads),
    }
    for group in GROUPS:
        if not any(size % group for size in sizes.values()):
            return group
    raise ValueError(
        f"--format w4a16 takes rows in groups of {', '.join(map(str, GROUPS))}, the model has "
        f"{sizes}: use int8 or fp8"
    )


def write_compressed(
    source: Source, folder: Path, name: str, reference: Reference, say: Say
) -> ExportedFormat:
    """Quantise the merged model, save it, and prove the folder by loading it again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers(), redirect_stderr(StringIO()):  # hides the library's progress bars
        model = AutoModelForCausalLM.from_pretrained(
            source.merged, dtype=torch.bfloat16, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source.merged, trust_remote_code=False)
        rows, how = [], "rounded to nearest"
        if SCHEMES[name].calibrated:
            rows, origin = find_calibration(source, model, tokenizer)
            how = f"GPTQ on {origin}"
            say(f"calibrating {name} on {origin}")
        quantize(model, settings(name, source.merged), rows)
        chosen = read_quantized(model)
        model.save_pretrained(folder, save_compressed=True)
        del model
        say(f"proving {name}")
        found = prove_compressed(source, folder, name, reference, chosen)
        return replace(found, figures={**found.figures, "weights": how})


def settings(name: str, merged: Path) -> dict[str, dict[str, Any] | None]:
    """Return a format's settings of weights and of activations, in compressed-tensors' words."""
    scheme = SCHEMES[name]
    known = {"num_bits": scheme.bits, "type": scheme.type, "symmetric": True}
    if scheme.calibrated:
        weights = {"strategy": "group", "dynamic": False, "group_size": choose_group(merged)}
        return {"weights": {**known, **weights}, "input_activations": None}
    weights = {"strategy": "channel", "dynamic": False}
    tokens = {"strategy": "token", "dynamic": True}
    return {"weights": {**known, **weights}, "input_activations": {**known, **tokens}}


def find_calibration(
    source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[list[int]], str]:
    """Return up to 128 sequences of a prompt and its completion, and where they come from: the
    run's own prompts with its policy's last samples, or built-in problems and the merged model's
    greedy answers."""

    def ask(question: str) -> str:
        return render_question(tokenizer, question, source.style)

    sampled = {row["question"]: row for row in read_jsonl(source.record.records / COMPLETIONS)}
    if not sampled:
        prompts = [ask(row["question"]) for row in generate_problems(NUM_ROWS, "train")]
        rows = continue_greedily(model, tokenizer, prompts, MAX_NEW_TOKENS)
        return rows, f"{len(rows)} built-in problems, answered by the merged model"
    texts = [
        ask(question)
        + row["completion"].removeprefix(source.style.prefill)
        + ("" if row["truncated"] else tokenizer.eos_token)
        for question, row in list(sampled.items())[-NUM_ROWS:]
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return rows, f"{len(rows)} prompts of the run with its last samples"


def load_rows(rows: list[list[int]]) -> "DataLoader":
    """Return what llm-compressor takes: one sequence per step, (1, T)."""
    from torch.utils.data import DataLoader

    ids = [torch.tensor([row]) for row in rows]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(batches, batch_size=None)


def quantize(model: "PreTrainedModel", asked: dict[str, Any], rows: list[list[int]]) -> None:
    """Let llm-compressor quantise every linear layer but the output layer, in place."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from loguru import logger

    for package in ("llmcompressor", "compressed_tensors"):
        logger.disable(package)
    modifier = GPTQModifier if rows else QuantizationModifier
    groups = {"group_0": {"targets": ["Linear"], **asked}}
    data = {"dataset": load_rows(rows)} if rows else {}
    oneshot(model=model, recipe=modifier(config_groups=groups, ignore=["lm_head"]), **data)


def read_quantized(model: "PreTrainedModel") -> Weights:
    """Return the values that each quantised weight will stand for, before they are packed."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    return {
        f"{name}.weight": fake_quantize(
            module.weight,
            module.weight_scale,
            getattr(module, "weight_zero_point", None),
            module.quantization_scheme.weights,
        ).detach()
        for name, module in model.named_modules()
        if hasattr(module, "weight_scale")
    }


def prove_compressed(
    source: Source, folder: Path, name: str, reference: Reference, chosen: Weights
) -> ExportedFormat:
    """Compare a compressed folder with the merged model, and with what was chosen for it."""
    scheme = SCHEMES[name]
    compare = partial(compare_weight, chosen, scheme)
    expected = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": settings(name, source.merged)},
    }
    found = prove_folder(source, folder, reference, compare, expected, scheme.largest_kl)
    return replace(found, commands=(("vllm", "serve", HERE),))


def compare_weight(
    chosen: Weights, scheme: Scheme, model: "PreTrainedModel", name: str, merged: torch.Tensor
) -> str | None:
    """Compare a quantised weight with the values chosen for it, which must lie near the merged
    ones; any other with the merged one itself."""
    found = model.get_parameter(name).detach()
    if name not in chosen:
        return describe_difference(found, merged)
    error = (chosen[name].float() - merged.float()).norm() / merged.float().norm()
    if not error <= scheme.largest_error:
        return f"is off by {error:.2%} of its size, more than {scheme.format} may be"
    return describe_difference(found, chosen[name])
