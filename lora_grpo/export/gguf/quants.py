"""GGUF's tensor types: which one each tensor takes, and how far it may move a value.

The bounds restate the formats (ggml's block layouts), not the code that writes them: a block of 32
values has one 16-bit scale, its largest value is kept to the precision of that scale, and every
other one lies within half a step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

BLOCK, SUPER_BLOCK = 32, 256
HALF_ULP = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
# Half the spacing of float16 below its smallest normal number.
F16_FLOOR = 2.0**-25
# Steps on the side of a block's largest value, and on the other.
STEPS = {"Q8_0": (127, 127), "Q5_0": (16, 15), "Q4_0": (8, 7)}
# What llama.cpp falls back to for rows that are no whole number of super-blocks: steps from a
# block's smallest value to its largest, both kept.
RANGE_STEPS = {"Q5_1": 31, "Q4_1": 15}
# K-quants: values in a sub-block, steps over its range (with zero in it).
K_STEPS = {"Q4_K": (32, 15), "Q5_K": (32, 31), "Q6_K": (16, 63)}
# Their scales are fitted by least squares, so a tensor's best factor onto its original is near 1.
# The worst of SmolLM2-135M's tensors was off by 0.0012.
K_FACTOR_SLACK = 0.005


@dataclass(frozen=True)
class Quant:
    """A kind of GGUF file: the type of its matrices, and of embeddings and output layer."""

    matrices: str
    embeddings: str
    file_type: int
    needs_llamacpp: bool = False


# file_type: llama.cpp's llama_ftype. At 4 and 5 bits llama.cpp keeps embeddings at 6, which is a
# K-quant; 8 bits is the nearest that Python's gguf writes.
QUANTS = {
    "f16": Quant("F16", "F16", 1),
    "bf16": Quant("BF16", "BF16", 32),
    "q8_0": Quant("Q8_0", "Q8_0", 7),
    "q5_0": Quant("Q5_0", "Q8_0", 8),
    "q4_0": Quant("Q4_0", "Q8_0", 2),
    "q6_k": Quant("Q6_K", "Q6_K", 18, needs_llamacpp=True),
    "q5_k_m": Quant("Q5_K", "Q6_K", 17, needs_llamacpp=True),
    "q4_k_m": Quant("Q4_K", "Q6_K", 15, needs_llamacpp=True),
}


def choose_type(name: str, shape: tuple[int, ...], quant: Quant) -> "GGMLQuantizationType":
    """Return the type of a tensor by its GGUF name: vectors stay in float32, and rows that are no
    whole number of blocks in float16."""
    from gguf import GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    kind = quant.embeddings if name in ("token_embd.weight", "output.weight") else quant.matrices
    if kind in STEPS and shape[-1] % BLOCK:
        kind = "F16"
    return GGMLQuantizationType[kind]


def quantize(values: np.ndarray, kind: "GGMLQuantizationType", name: str) -> np.ndarray:
    """Return float32 values as the bytes of a type.

    Raises:
        ValueError: a value is larger than the type holds.
    """
    import gguf

    with np.errstate(over="ignore"):
        data = gguf.quantize(np.ascontiguousarray(values), kind)
        limited = kind.name in ("F16", *STEPS)
        if limited and not np.isfinite(gguf.dequantize(data, kind)).all():
            raise ValueError(
                f"{name} reaches {np.abs(values).max():.3g}, more than --quant with 16-bit scales "
                "holds (65504): use --quant bf16"
            )
    return data


def error_bound(values: np.ndarray, kind: str) -> np.ndarray:
    """Return by how much a type may move each float32 value at most, in the values' shape.

    Raises:
        KeyError: the type is not known here.
    """
    if kind in HALF_ULP:
        floor = F16_FLOOR if kind == "F16" else 0.0
        return np.abs(values) * np.float32(HALF_ULP[kind]) + np.float32(floor)
    if kind in K_STEPS:
        return bound_of_k_quant(values, *K_STEPS[kind])
    if kind in RANGE_STEPS:
        return bound_of_range(values, RANGE_STEPS[kind])
    steps, other = STEPS[kind]
    blocks = values.reshape(-1, BLOCK).astype(np.float32)
    peak = np.abs(blocks).argmax(-1)[:, None]  # (blocks, 1)
    largest = np.take_along_axis(blocks, peak, -1)
    step = np.abs(largest) / steps
    # On the other side the scale ends early: what lies beyond its last step is cut to it.
    beyond = np.maximum(0, -blocks * np.sign(largest) - (other + 0.5) * step)
    scale_error = np.abs(largest) * 2.0**-10 + (steps + 1) * F16_FLOOR
    bound = step / 2 + beyond + scale_error
    np.put_along_axis(bound, peak, scale_error, -1)
    return bound.reshape(values.shape)


def bound_of_range(values: np.ndarray, steps: int) -> np.ndarray:
    """Return half a step of each block's range, and for its two ends what their scale loses."""
    blocks = values.reshape(-1, BLOCK).astype(np.float32)
    low, high = blocks.min(-1)[:, None], blocks.max(-1)[:, None]
    scale_error = (high - low + np.abs(low)) * 2.0**-10 + (steps + 1) * F16_FLOOR
    is_end = (blocks == low) | (blocks == high)
    bound = np.where(is_end, scale_error, (high - low) / steps / 2 + scale_error)
    return bound.reshape(values.shape)


def bound_of_k_quant(values: np.ndarray, sub_block: int, steps: int) -> np.ndarray:
    """Return one step of the coarsest sub-block of each super-block of 256 values.

    A sub-block's own step is rounded to a share of the super-block's largest, and the fit moves it.
    """
    blocks = values.reshape(-1, SUPER_BLOCK // sub_block, sub_block).astype(np.float32)
    if steps % 2 and sub_block == 16:  # symmetric about zero
        spread = 2 * np.abs(blocks).max(-1)
    else:
        spread = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
    step = spread.max(-1)[:, None, None] / steps + F16_FLOOR
    return np.broadcast_to(step, blocks.shape).reshape(values.shape)


def count_faults(values: np.ndarray, found: np.ndarray, kind: str) -> tuple[int, float]:
    """Return how many values of a tensor lie further off than its type may move them, and the
    largest error of those.

    For a K-quant all of them do where the tensor as a whole is scaled.
    """
    error = np.abs(found - values)
    wrong = ~(error <= error_bound(values, kind))
    if kind in K_STEPS and np.any(found):
        factor = float((found * values).sum(dtype=np.float64) / (found**2).sum(dtype=np.float64))
        if not abs(factor - 1) <= K_FACTOR_SLACK:
            wrong = np.ones_like(wrong)
    worst = float(error[wrong].max()) if wrong.any() else 0.0
    return int(wrong.sum()), worst
