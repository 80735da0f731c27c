"""What a compressed-tensors folder stores, read by the format's own rules: codes, scales, types.

A folder goes in; float32 weights and what its config says of them come out. The library that wrote
it is not asked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_grpo.machine.files import read_json
from lora_grpo.merge.tensors import StoredTensor, read_header, read_tensor

GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """How codes are stored, the scale of a group by its largest value, and the widest error: in
    steps of the scale, or for floats as a share of the value; None where GPTQ chooses the codes."""

    format: str
    bits: int
    type: str
    largest: float
    steps: float | None
    share: float = 0.0

    @property
    def calibrated(self) -> bool:
        return self.steps is None


# The scales are those of a range from -largest to largest. llm-compressor divides in bfloat16,
# which moves a quotient of 127 by up to a quarter, so that a tie may fall to either side.
SCHEMES = {
    "fp8": Scheme("float-quantized", 8, "float", 448.0, 2.0**-10, 2.0**-4 + 2.0**-7),
    "int8": Scheme("int-quantized", 8, "int", 127.5, 0.5 + 0.5),
    "w4a16": Scheme("pack-quantized", 4, "int", 7.5, None),
}


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


def settings(name: str, merged: Path) -> dict[str, dict[str, Any] | None]:
    """Return a format's settings of weights and of activations, in compressed-tensors' words."""
    scheme = SCHEMES[name]
    known = {"num_bits": scheme.bits, "type": scheme.type, "symmetric": True}
    if scheme.calibrated:
        weights = {"strategy": "group", "dynamic": False, "group_size": choose_group(merged)}
        return {"weights": {**known, **weights}, "input_activations": None}
    weights = {"strategy": "channel", "dynamic": False, "group_size": None}
    tokens = {"strategy": "token", "dynamic": True, "group_size": None}
    return {"weights": {**known, **weights}, "input_activations": {**known, **tokens}}


Stored = dict[str, StoredTensor]


@dataclass(frozen=True)
class Packed:
    """One quantised weight by groups, in float32: codes (out, groups, G), scale (out, groups)."""

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """What the codes stand for, (out, groups, G)."""
        return self.codes * self.scale[..., None]


def read_stored(folder: Path) -> Stored:
    """Return the stored tensors of a folder, packed ones among them."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(path).items()
    }


def is_packed(stored: Stored, name: str) -> bool:
    return f"{name}_scale" in stored


def unpack(stored: Stored, name: str, shape: torch.Size) -> Packed:
    """Return a weight's codes and scales: eight 4-bit codes to an int32, lowest first and offset by
    8, or one a byte."""
    scale = read_tensor(stored[f"{name}_scale"]).float()
    packed = stored.get(f"{name}_packed")
    if packed is None:
        codes = read_tensor(stored[name]).float()
    else:
        words = read_tensor(packed).to(torch.int64)[..., None]  # (out, in / 8, 1)
        codes = (((words >> (4 * torch.arange(8))) & 15) - 8).flatten(1)[:, : shape[1]].float()
    return Packed(codes.unflatten(1, (scale.shape[1], -1)), scale)


def describe_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config says that decides how codes are read and activations rounded."""
    said = config.get("quantization_config", {})
    groups = said.get("config_groups", {})
    found = {name: said.get(name) for name in ("quant_method", "format", "ignore")}
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size")
    for part in ("weights", "input_activations"):
        args = [group.get(part) for group in groups.values()]
        found[part] = [args and {key: args.get(key) for key in keys} for args in args]
    return found
