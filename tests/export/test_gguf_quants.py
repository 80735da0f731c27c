"""The bounds of GGUF's types hold for what the gguf package writes, and notice 1 %."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lora_grpo.export.gguf.quants import QUANTS, choose_type, count_faults, error_bound, quantize

WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1")


def roundtrip(values: np.ndarray, kind: str) -> np.ndarray:
    qtype = GGMLQuantizationType[kind]
    return gguf.dequantize(gguf.quantize(values, qtype), qtype).reshape(values.shape)


def draw(seed: int, shape: tuple[int, ...] = (16, 128)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_lies_within_the_bound(kind: str) -> None:
    for seed in range(20):
        values = draw(seed)
        assert count_faults(values, roundtrip(values, kind), kind) == (0, 0.0)


@pytest.mark.parametrize("kind", WRITTEN)
@settings(max_examples=60, deadline=None)
@given(
    values=arrays(
        np.float32,
        (2, 32),
        elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
    )
)
def test_odd_blocks_lie_within_the_bound(kind: str, values: np.ndarray) -> None:
    """Zeros, ties of opposite sign, one large value among small ones."""
    assert count_faults(values, roundtrip(values, kind), kind)[0] == 0


@pytest.mark.parametrize("kind", WRITTEN)
def test_one_per_cent_is_noticed(kind: str) -> None:
    values = draw(0)
    scaled = roundtrip(values * np.float32(1.01), kind)
    assert count_faults(values, scaled, kind)[0] >= (16 * 128) // 32


@pytest.mark.parametrize("kind", WRITTEN[1:])
def test_a_value_beyond_half_a_step_is_noticed(kind: str) -> None:
    values = draw(1)
    found = roundtrip(values, kind)
    found[3, 5] = values[3, 5] + 1.1 * error_bound(values, kind)[3, 5]
    assert count_faults(values, found, kind)[0] == 1
    found[3, 5] = np.nan
    assert count_faults(values, found, kind)[0] == 1


def test_a_tensor_takes_its_type() -> None:
    four = QUANTS["q4_0"]
    assert choose_type("blk.0.attn_q.weight", (64, 128), four).name == "Q4_0"
    assert choose_type("token_embd.weight", (512, 128), four).name == "Q8_0"
    assert choose_type("output_norm.weight", (128,), four).name == "F32"
    assert choose_type("blk.0.attn_q.weight", (64, 100), four).name == "F16"


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_value_that_the_type_cannot_hold_is_refused(kind: str) -> None:
    values = np.full((1, 32), 1e9, np.float32)
    with pytest.raises(ValueError, match=r"blk\.0 reaches 1e\+09.*use --quant bf16"):
        quantize(values, GGMLQuantizationType[kind], "blk.0")
