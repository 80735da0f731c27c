"""Folders in the format compressed-tensors, written by llm-compressor, which vLLM serves: 8-bit
floats, 8-bit integers, or 4-bit weights alone.

At 8 bits the weights are rounded to nearest, without calibration data; at 4 bits GPTQ chooses them
on the run's own prompts. Activations are scaled as they come, so they need no data. Embeddings and
output layer stay in 16 bits.
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.export.calibration import Calibration, check_layers, find_calibration, load_rows
from lora_grpo.export.compressed_format import (
    SCHEMES,
    Scheme,
    Stored,
    choose_group,
    describe_settings,
    is_packed,
    read_stored,
    settings,
    unpack,
)
from lora_grpo.export.source import HERE, Outcome, Source
from lora_grpo.machine.files import read_json
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.inputs import read_base
from lora_grpo.merge.tensors import read_tensor
from lora_grpo.proof.checks import Check, check_folder, check_reload, describe_distance
from lora_grpo.proof.distance import collect_logits
from lora_grpo.proof.reference import Reference, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A scale is rounded to bfloat16, its maximum was too.
SCALE_SLACK = 2.0**-8 + 2.0**-10


def check_compressed(folder: Path, name: str) -> None:
    """Raise a ValueError where llm-compressor is not installed or a row is no whole number of
    groups."""
    if find_spec("llmcompressor") is None:
        raise ValueError(
            f"--format {name} is written by llm-compressor, which is not installed: use an "
            "environment with it (pip install -r requirements-llmcompressor.txt)"
        )
    if name == "w4a16":
        choose_group(folder)


def write_compressed(
    source: Source, folder: Path, name: str, seen: Reference, report: Callable[[str], None]
) -> Outcome:
    """Quantise the merged model, save it, and prove the folder by loading it again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers(), redirect_stderr(StringIO()):  # its bars ask nobody
        model = AutoModelForCausalLM.from_pretrained(
            source.merged, dtype=torch.bfloat16, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source.merged, trust_remote_code=False)
        calibration = None
        if SCHEMES[name].calibrated:
            calibration = find_calibration(source, model, tokenizer)
            report(f"calibrating {name} on {calibration.origin}")
        quantize(model, settings(name, source.merged), calibration)
        chosen = copy_linear(model) if calibration else {}
        model.save_pretrained(folder, save_compressed=True)
        del model
        report(f"proving {name}")
        return prove_compressed(source, folder, name, seen, calibration, chosen)


def quantize(
    model: "PreTrainedModel",
    asked: dict[str, Any],
    calibration: Calibration | None,
) -> None:
    """Let llm-compressor quantise every linear layer but the output layer, in place."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from loguru import logger

    for package in ("llmcompressor", "compressed_tensors"):
        logger.disable(package)
    modifier = GPTQModifier if calibration else QuantizationModifier
    groups = {"group_0": {"targets": ["Linear"], **asked}}
    data = {"dataset": load_rows(calibration.rows)} if calibration else {}
    oneshot(model=model, recipe=modifier(config_groups=groups, ignore=["lm_head"]), **data)


def copy_linear(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Return what GPTQ made of each weight, before it is packed."""
    return {name: model.get_parameter(name).detach().clone() for name in list_linear(model)}


def prove_compressed(
    source: Source,
    folder: Path,
    name: str,
    seen: Reference,
    calibration: Calibration | None,
    chosen: dict[str, torch.Tensor],
) -> Outcome:
    """Load a folder as transformers reads the format, and compare it with the merged model."""
    from transformers import AutoModelForCausalLM

    release_memory()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, trust_remote_code=False
        )
        linear = list_linear(model)
        logits = list(collect_logits(model.eval(), seen.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return Outcome((Check("reload", False, f"{type(error).__name__}: {error}"),), {}, ())
    stored = read_stored(folder)
    checks = [
        check_reload(loading),
        check_weights(source.merged, stored, linear, SCHEMES[name], chosen),
        check_settings(folder, name, settings(name, source.merged)),
        *check_folder(source.merged, folder, model),
    ]
    if calibration and checks[1].passed:
        checks.append(check_layers(source.merged, stored, calibration.rows))
    figures = {
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "weights": f"GPTQ on {calibration.origin}" if calibration else "rounded to nearest",
        "from_merged": describe_distance(seen.logits, logits),
    }
    return Outcome(tuple(checks), figures, (("vllm", "serve", HERE),))


def list_linear(model: "PreTrainedModel") -> set[str]:
    """Return the weights that are to be quantised: every linear layer's but the output layer's."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }


def check_settings(folder: Path, name: str, asked: dict[str, Any]) -> Check:
    """Compare what the config says of codes and activations with what was asked for."""
    expected = {
        "quant_method": "compressed-tensors",
        "format": SCHEMES[name].format,
        "ignore": ["lm_head"],
        **{part: [values] for part, values in asked.items()},
    }
    found = describe_settings(read_json(folder / "config.json"))
    faults = [f"{key} is {found[key]}" for key in expected if found[key] != expected[key]]
    return Check("quantization", not faults, "; ".join(faults) or SCHEMES[name].format)


def check_weights(
    merged: Path,
    stored: Stored,
    linear: set[str],
    scheme: Scheme,
    chosen: dict[str, torch.Tensor],
) -> Check:
    """Unpack every weight by the format's own rules, and compare value and scale with the merged
    one's."""
    tied = bool(read_json(merged / "config.json").get("tie_word_embeddings"))
    faults = []
    for name, tensor in read_base(merged).items():
        weight = read_tensor(tensor).to(torch.bfloat16)
        if name in linear:
            faults += compare(name, weight.float(), stored, scheme, chosen.get(name))
        elif name not in stored:
            faults += [] if tied and name == "lm_head.weight" else [f"{name} is missing"]
        elif not read_tensor(stored[name]).equal(weight):
            faults.append(f"{name} differs")
    bound = "as GPTQ chose them" if scheme.calibrated else "each value within its type's bound"
    detail = "; ".join(faults[:3]) or f"{len(linear)} weights {bound}, the rest unchanged"
    return Check("tensors", not faults and bool(linear), detail)


def compare(
    name: str,
    weight: torch.Tensor,
    stored: Stored,
    scheme: Scheme,
    chosen: torch.Tensor | None,
) -> list[str]:
    """Return what is wrong with one quantised weight, (out, in)."""
    if not is_packed(stored, name):
        return [f"{name} is not quantised"]
    packed = unpack(stored, name, weight.shape)
    grouped = weight.unflatten(1, packed.codes.shape[1:])  # (out, groups, G)
    implied = grouped.abs().amax(-1) / scheme.largest
    if not torch.all((packed.scale - implied).abs() <= SCALE_SLACK * implied + 1e-12):
        return [f"{name} has scales that its weights do not imply"]
    if chosen is not None:  # the same values, but for bfloat16
        wanted = chosen.float().view_as(grouped)
        error, bound = (packed.values - wanted).abs(), 2.0**-8 * wanted.abs()
    else:
        error = (packed.values - grouped).abs()
        bound = scheme.steps * packed.scale[..., None] + scheme.share * grouped.abs()
    wrong = int((~(error <= bound)).sum())
    return [f"{name}: {wrong} of {weight.numel()} values are off by more than allowed"] * bool(
        wrong
    )
