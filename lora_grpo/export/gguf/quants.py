"""GGUF's tensor types: which one each tensor takes, and whether its stored values are right."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

BLOCK, BLOCKED = 32, ("Q8_0", "Q5_0", "Q4_0")
# K-quants fit the scales of a block by least squares, so the best factor from a whole tensor to its
# original is near 1: the worst of SmolLM2-135M's tensors was off by 0.0012.
SLACK = 0.005


@dataclass(frozen=True)
class Quant:
    """A kind of GGUF file: the type of its matrices, and of embeddings and output layer.

    `largest_kl` is the mean KL from the merged model, in nats per token, beyond which the file is
    not taken for the same model: several times the worst in docs/exports.md.
    """

    matrices: str
    embeddings: str
    file_type: int
    largest_kl: float
    needs_llamacpp: bool = False


# file_type: llama.cpp's llama_ftype. At 4 and 5 bits llama.cpp keeps embeddings at 6, which is a
# K-quant; 8 bits is the nearest that Python's gguf writes.
QUANTS = {
    "f16": Quant("F16", "F16", 1, 0.01),
    "bf16": Quant("BF16", "BF16", 32, 0.01),
    "q8_0": Quant("Q8_0", "Q8_0", 7, 0.05),
    "q5_0": Quant("Q5_0", "Q8_0", 8, 0.5),
    "q4_0": Quant("Q4_0", "Q8_0", 2, 1.0),
    "q6_k": Quant("Q6_K", "Q6_K", 18, 0.1, needs_llamacpp=True),
    "q5_k_m": Quant("Q5_K", "Q6_K", 17, 0.5, needs_llamacpp=True),
    "q4_k_m": Quant("Q4_K", "Q6_K", 15, 1.0, needs_llamacpp=True),
}


def choose_type(name: str, shape: tuple[int, ...], quant: Quant) -> "GGMLQuantizationType":
    """Return the type of a tensor by its GGUF name: vectors stay in float32, and rows that are no
    whole number of blocks in float16."""
    from gguf import GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    kind = quant.embeddings if name in ("token_embd.weight", "output.weight") else quant.matrices
    if kind in BLOCKED and shape[-1] % BLOCK:
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
        limited = kind.name in ("F16", *BLOCKED)
        if limited and not np.isfinite(gguf.dequantize(data, kind)).all():
            raise ValueError(
                f"{name} reaches {np.abs(values).max():.3g}, more than --quant with 16-bit scales "
                "holds (65504): use --quant bf16"
            )
    return data


def find_fault(values: np.ndarray, found: np.ndarray, kind: str, by_llamacpp: bool) -> str | None:
    """Return what is wrong with a stored tensor that was made of `values`, None where nothing is.

    It must be what the gguf package makes of the values: bit for bit if that wrote it, but for a
    few values that llama.cpp rounds otherwise. K-quants, which the package does not write, must be
    as large as the values, and off by at most a few steps of their bits.
    """
    if kind.endswith("_K"):
        factor = np.vdot(found, values) / max(np.vdot(found, found), 1e-30)
        error = relative_error(found, values)
        if abs(factor - 1) <= SLACK and error <= 4 * 2.0 ** -int(kind[1]):
            return None
        return f"its values are {1 / factor:.4f} times the merged ones, {error:.2%} off"
    import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(np.ascontiguousarray(values), qtype), qtype)
    expected = expected.reshape(found.shape)
    if np.array_equal(found, expected) or (by_llamacpp and relative_error(found, expected) < SLACK):
        return None
    return f"it differs by up to {np.abs(found - expected).max():.3g}"


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of what differs as a share of the expected norm."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
