"""What a compressed-tensors folder stores, read by the format's own rules: codes, scales, types.

A folder goes in; float32 weights and what its config says of them come out. The library that wrote
it is not asked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_grpo.safetensors_stream import StoredTensor, read_header, read_tensor

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
