"""Folders in the format compressed-tensors, written by llm-compressor, which vLLM serves: 8-bit
floats, 8-bit integers, or 4-bit weights alone.

The weights are rounded to nearest, without calibration data: the same model always gives the same
folder, and each value is provably within half a step. Activations are scaled as they come, so they
need no data either. Embeddings and output layer stay in 16 bits.
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch

from lora_grpo.adapter import read_json
from lora_grpo.export_checks import check_folder, describe_distance
from lora_grpo.export_reference import Reference
from lora_grpo.export_source import Outcome, Source
from lora_grpo.logit_distance import collect_logits
from lora_grpo.merge_checks import Check
from lora_grpo.merge_inputs import read_base
from lora_grpo.merge_proof import quiet_transformers, release_memory
from lora_grpo.safetensors_stream import StoredTensor, read_header, read_tensor

PACKAGE = "llmcompressor==0.14.0.1"
GROUP = 128


@dataclass(frozen=True)
class Scheme:
    """llm-compressor's name, the scale of a group by its largest value, and the widest error: in
    steps of the scale, or for floats as a share of the value."""

    name: str
    largest: float
    steps: float
    share: float = 0.0


# The scales are those of a range from -largest to largest. llm-compressor divides in bfloat16,
# which moves a quotient of 127 by up to a quarter, so that a tie may fall to either side.
SCHEMES = {
    "fp8": Scheme("FP8_DYNAMIC", 448.0, 2.0**-10, 2.0**-4 + 2.0**-7),
    "int8": Scheme("W8A8", 127.5, 0.5 + 0.5),
    "w4a16": Scheme("W4A16", 7.5, 0.5 + 0.04),
}
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
    config = read_json(folder / "config.json")
    sizes = {key: config.get(key, GROUP) for key in ("hidden_size", "intermediate_size")}
    odd = {key: size for key, size in sizes.items() if size % GROUP}
    if name == "w4a16" and odd:
        raise ValueError(
            f"--format w4a16 takes rows in groups of {GROUP}, the model has {odd}: use int8 or fp8"
        )


def write_compressed(
    source: Source, folder: Path, name: str, seen: Reference, report: Callable[[str], None]
) -> Outcome:
    """Quantise the merged model, save it, and prove the folder by loading it again."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.disable("llmcompressor")
    recipe = QuantizationModifier(targets="Linear", scheme=SCHEMES[name].name, ignore=["lm_head"])
    with quiet_transformers(), redirect_stderr(StringIO()):  # its bars ask nobody
        model = AutoModelForCausalLM.from_pretrained(source.merged, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source.merged)
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe)
        model.save_pretrained(folder, save_compressed=True)
        del model
        report(f"proving {name}")
        return prove_compressed(source, folder, name, seen)


def prove_compressed(source: Source, folder: Path, name: str, seen: Reference) -> Outcome:
    """Load a folder as transformers reads the format, and compare it with the merged model."""
    from transformers import AutoModelForCausalLM

    release_memory()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        logits = list(collect_logits(model, seen.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return Outcome((Check("reload", False, f"{type(error).__name__}: {error}"),), {}, ())
    checks = [
        check_weights(source.merged, folder, SCHEMES[name]),
        *check_folder(source.merged, folder, model),
    ]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    figures = {
        "bytes": size,
        "weights": "rounded to nearest, no calibration data",
        "from_merged": describe_distance(seen.logits, logits),
    }
    return Outcome(tuple(checks), figures, ("vllm serve FOLDER",))


def check_weights(merged: Path, folder: Path, scheme: Scheme) -> Check:
    """Unpack every weight by the format's own rules, and compare value and scale with the merged
    one's."""
    stored, faults, quantized = read_packed(folder), [], 0
    for name, tensor in read_base(merged).items():
        weight = read_tensor(tensor).to(torch.bfloat16)
        if f"{name}_scale" in stored:
            quantized += 1
            faults += compare(name, weight.float(), stored, scheme)
        elif name in stored and not read_tensor(stored[name]).equal(weight):
            faults.append(f"{name} differs")
        elif name not in stored and name != "lm_head.weight":
            faults.append(f"{name} is missing")
    detail = "; ".join(faults[:3]) or f"{quantized} weights within half a step, the rest unchanged"
    return Check("tensors", not faults and quantized > 0, detail)


def read_packed(folder: Path) -> dict[str, StoredTensor]:
    """Return the stored tensors of a folder, packed ones among them."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(path).items()
    }


def compare(
    name: str, weight: torch.Tensor, stored: dict[str, StoredTensor], scheme: Scheme
) -> list[str]:
    """Return what is wrong with one quantised weight, (out, in)."""
    scale = read_tensor(stored[f"{name}_scale"]).float()  # (out, groups)
    grouped = weight.unflatten(1, (scale.shape[1], -1))  # (out, groups, G)
    implied = grouped.abs().amax(-1) / scheme.largest
    if not torch.all((scale - implied).abs() <= SCALE_SLACK * implied + 1e-12):
        return [f"{name} has scales that its weights do not imply"]
    codes = unpack(name, stored, weight.shape).unflatten(1, (scale.shape[1], -1))
    error = (codes * scale[..., None] - grouped).abs()
    bound = scheme.steps * scale[..., None] + scheme.share * grouped.abs()
    wrong = int((~(error <= bound)).sum())
    return (
        [f"{name}: {wrong} of {weight.numel()} values are off by more than a step"] if wrong else []
    )


def unpack(name: str, stored: dict[str, StoredTensor], shape: torch.Size) -> torch.Tensor:
    """Return a weight's codes in float32: eight 4-bit ones to an int32, lowest first and offset by
    8, or one a byte."""
    packed = stored.get(f"{name}_packed")
    if packed is None:
        return read_tensor(stored[name]).float()
    words = read_tensor(packed).to(torch.int64)[..., None]  # (out, in / 8, 1)
    codes = ((words >> (4 * torch.arange(8))) & 15) - 8
    return codes.flatten(1)[:, : shape[1]].float()
