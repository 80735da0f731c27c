"""The streamed safetensors files are those of the safetensors library, read and written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_grpo.merge.tensors import (
    DTYPES,
    Slot,
    read_header,
    read_tensor,
    write_safetensors,
)

TENSORS = {
    "bfloat16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "float16": torch.tensor([[1.5, -2.0]], dtype=torch.float16),
    "float32": torch.arange(7.0),
    "int64": torch.tensor([[3], [-4]]),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}


def slots_of(tensors: dict[str, torch.Tensor]) -> list[Slot]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [Slot(name, names[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def test_reads_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read_tensor(found[name]).equal(tensor)
        assert read_tensor(found[name]).dtype == tensor.dtype


def test_the_library_reads_what_is_written_in_blocks(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, slots_of(TENSORS), lambda slot: TENSORS[slot.name].flatten().split(2))
    found = load_file(path)
    assert all(found[name].equal(tensor) for name, tensor in TENSORS.items())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    assert json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"x" * 200])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(10)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file .*fetch it"):
        read_header(path)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([torch.zeros(3)], "x has 4 elements, 3 were written"),
        ([torch.zeros(4).half()], "x was laid out as F32, got torch.float16"),
    ],
)
def test_a_wrong_block_is_refused(tmp_path, blocks, message):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "a", [Slot("x", "F32", (4,))], lambda slot: blocks)
