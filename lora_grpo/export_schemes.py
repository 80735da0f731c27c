"""The three compressed-tensors formats: how codes are stored, in which groups, within which bound,
and the same in the words of compressed-tensors' config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapter import read_json

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
