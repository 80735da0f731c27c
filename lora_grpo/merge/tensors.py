"""Read and write safetensors files a piece at a time, so that memory does not grow with the file.

A header goes in, or a layout; tensors come out, or a file. Plain reads at offsets, since the pages
of a memory map count as the process's memory. The format: 8 bytes little-endian header length, a
JSON header padded with spaces, raw data.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
FLOATS = ("F64", "F32", "F16", "BF16")
BLOCK_ELEMENTS = 1 << 22
ALIGNMENT = 8


@dataclass(frozen=True)
class Slot:
    """What a header says of a tensor, before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor(Slot):
    """A tensor in a file: `offset` counts from the file's first byte."""

    path: Path
    offset: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their data.

    Raises:
        ValueError: the file is cut short, is no safetensors file, or holds a type not known here.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = [place_tensor(path, 8 + length, name, said) for name, said in header.items()]
        if tensors and max(end_of(tensor) for tensor in tensors) != path.stat().st_size:
            raise ValueError("its size is not what its header says")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): fetch it again"
        ) from error
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def place_tensor(path: Path, data_start: int, name: str, said: dict) -> StoredTensor:
    if said["dtype"] not in DTYPES:
        raise ValueError(f"{name} has type {said['dtype']}, known are {', '.join(DTYPES)}")
    begin, end = said["data_offsets"]
    tensor = StoredTensor(name, said["dtype"], tuple(said["shape"]), path, data_start + begin)
    if tensor.nbytes != end - begin:
        raise ValueError(f"{name} takes {end - begin} bytes, its shape needs {tensor.nbytes}")
    return tensor


def end_of(tensor: StoredTensor) -> int:
    return tensor.offset + tensor.nbytes


def read_blocks(tensor: StoredTensor, elements: int = BLOCK_ELEMENTS) -> Iterator[torch.Tensor]:
    """Yield the tensor's elements in order, flat, in chunks of at most `elements`."""
    dtype = DTYPES[tensor.dtype]
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.numel, elements):
            block = bytearray(min(elements, tensor.numel - start) * dtype.itemsize)
            fill(file, block, tensor)
            yield torch.frombuffer(block, dtype=dtype)


def fill(file, block: bytearray, tensor: StoredTensor) -> None:
    view, filled = memoryview(block), 0
    while filled < len(block):
        count = file.readinto(view[filled:])
        if not count:
            raise ValueError(f"{tensor.path} ends inside {tensor.name}: fetch it again")
        filled += count


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """Return one whole tensor."""
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    return next(read_blocks(tensor, tensor.numel)).view(tensor.shape)


def build_header(layout: Iterable[Slot]) -> bytes:
    """Return the length and the JSON header of a file that holds the tensors in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot in layout:
        begin, end = end, end + slot.nbytes
        header[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, layout: list[Slot], produce: Callable[[Slot], Iterable[torch.Tensor]]
) -> None:
    """Write a file, its header first; `produce` gives a tensor's elements in order, in blocks.

    Raises:
        ValueError: a tensor's blocks are of another type, or more or fewer than its shape says.
    """
    with path.open("wb") as file:
        file.write(build_header(layout))
        for slot in layout:
            written = 0
            for block in produce(slot):
                if block.dtype != DTYPES[slot.dtype]:
                    raise ValueError(f"{slot.name} was laid out as {slot.dtype}, got {block.dtype}")
                file.write(memoryview(block.contiguous().flatten().view(torch.uint8).numpy()))
                written += block.numel()
            if written != slot.numel:
                raise ValueError(f"{slot.name} has {slot.numel} elements, {written} were written")
