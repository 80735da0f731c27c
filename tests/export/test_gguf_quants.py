"""A stored tensor that is not what its type makes of the merged one is noticed."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora_grpo.export.gguf.quants import QUANTS, choose_type, find_fault, quantize

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0")


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (64, 128)).astype(np.float32)


def store(values: np.ndarray, kind: str) -> np.ndarray:
    qtype = GGMLQuantizationType[kind]
    return gguf.dequantize(quantize(values, qtype, "w"), qtype).reshape(values.shape)


@pytest.mark.parametrize("kind", TYPES)
def test_one_value_or_one_per_cent_is_noticed(kind: str) -> None:
    values = draw(0)
    found = store(values, kind)
    assert find_fault(values, found, kind, by_llamacpp=False) is None
    for change in (1.01, 0.99):
        scaled = store(values * np.float32(change), kind)
        assert find_fault(values, scaled, kind, by_llamacpp=False)
    for value in (np.nextafter(found[3, 5], np.float32(1)), np.nan):
        damaged = found.copy()
        damaged[3, 5] = value
        assert find_fault(values, damaged, kind, by_llamacpp=False)


def damages(found: np.ndarray) -> list[np.ndarray]:
    wrong = (found * 1.01, found * 0.98, np.roll(found, 1, axis=0), 0 * found, found * np.nan)
    return [values.astype(np.float32) for values in wrong]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_a_k_quant_may_be_off_by_noise_and_not_by_a_factor(kind: str) -> None:
    """Noise of half a step, if all steps span four standard deviations, and a scale that is fitted
    by least squares, as K-quants fit theirs."""
    values, bits = draw(1), int(kind[1])
    noise = np.random.default_rng(2).uniform(-0.5, 0.5, values.shape).astype(np.float32)
    found = values + noise * np.float32(0.05 * 4 / 2**bits)
    found *= np.vdot(found, values) / np.vdot(found, found)
    assert find_fault(values, found, kind, by_llamacpp=True) is None
    for damaged in damages(found):
        assert find_fault(values, damaged, kind, by_llamacpp=True)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("stored_before", [None, "Q4_1"])
def test_llamacpp_may_round_a_few_values_otherwise(kind: str, stored_before: str | None) -> None:
    """Weights that were stored in 4 bits before come out 2 % too large in Q5_1, and rightly so."""
    values = draw(1) if stored_before is None else store(draw(1), stored_before)
    found = store(values, kind)
    if (kind, stored_before) == ("Q5_1", "Q4_1"):
        assert np.vdot(found, values) / np.vdot(found, found) < 0.99
    otherwise = found.copy()
    otherwise[:2, :2] = values[:2, :2]
    assert find_fault(values, otherwise, kind, by_llamacpp=True) is None
    for damaged in damages(found):
        assert find_fault(values, damaged, kind, by_llamacpp=True)


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
