"""A quantised folder, loaded as any user loads it and compared with the merged model."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.export.source import ExportedFormat, Source
from lora_grpo.machine.files import read_json
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.inputs import read_base
from lora_grpo.merge.tensors import read_tensor
from lora_grpo.policy.base import keep_4bit_as_stored
from lora_grpo.proof.checks import Check, check_folder, check_kl, check_reload
from lora_grpo.proof.distance import collect_logits, measure_distance
from lora_grpo.proof.reference import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What is wrong with the loaded weight of a name, given the merged one in bfloat16.
Compare = Callable[["PreTrainedModel", str, torch.Tensor], str | None]


def prove_folder(
    source: Source,
    folder: Path,
    reference: Reference,
    compare: Compare,
    expected: dict[str, Any],
    largest_kl: float,
) -> ExportedFormat:
    """Load a quantised folder, and compare weights, settings, logits and all that lies around.

    `expected` is what config.json has to say of the quantisation.
    """
    from transformers import AutoModelForCausalLM

    release_memory()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, trust_remote_code=False
        )
        keep_4bit_as_stored(model, torch.bfloat16)
        logits = list(collect_logits(model.eval(), reference.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        check = Check("reload", False, f"{type(error).__name__}: {error}")
        return ExportedFormat((check,), {})
    distance = measure_distance(reference.logits, logits)
    checks = (
        check_reload(loading),
        check_weights(source.merged, model, compare),
        check_settings(folder, expected),
        check_kl(distance, largest_kl),
        *check_folder(source.merged, folder, model),
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return ExportedFormat(checks, {"bytes": size, "from_merged": asdict(distance)})


def check_weights(merged: Path, model: "PreTrainedModel", compare: Compare) -> Check:
    """Compare every loaded weight with what quantising makes of the merged one."""
    held, faults = {name for name, _ in model.named_parameters()}, []
    for name, tensor in read_base(merged).items():
        if name in held:
            fault = compare(model, name, read_tensor(tensor).to(torch.bfloat16))
            faults += [f"{name} {fault}"] if fault else []
    detail = "; ".join(faults[:3]) or f"{len(held)} weights are the merged ones, as quantised"
    return Check("tensors", not faults and bool(held), detail)


def check_settings(folder: Path, expected: dict[str, Any]) -> Check:
    """Compare what config.json says of the quantisation with what was asked for."""
    found = read_json(folder / "config.json").get("quantization_config")
    faults = list_differences("quantization_config", found, expected)
    return Check("quantization", not faults, "; ".join(faults) or "as asked for")


def list_differences(name: str, found: Any, expected: Any) -> list[str]:
    """Return where a JSON value is not the expected one; of an object only the expected keys."""
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        return [] if found == expected else [f"{name} is {found}, expected {expected}"]
    pairs = ((f"{name}.{key}", found.get(key), value) for key, value in expected.items())
    return [fault for pair in pairs for fault in list_differences(*pair)]


def describe_difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Return by how much two weights differ, None where they are equal."""
    if found.shape != expected.shape:
        return f"is {list(found.shape)}, expected {list(expected.shape)}"
    error = (found.float() - expected.float()).abs().max().item()
    return None if error == 0 else f"differs by up to {error:.3g}"
