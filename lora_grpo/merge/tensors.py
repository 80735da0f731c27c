"""Safetensors files tensor by tensor, so that memory does not grow with the file.

The library reads; it has no way to write a file in parts, so that is done here. The format: 8 bytes
little-endian header length, a JSON header padded with spaces, raw data.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

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
BLOCK_ELEMENTS = 1 << 19
ALIGNMENT = 8


@dataclass(frozen=True)
class Slot:
    """What a header says of a tensor."""

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
    """A tensor in a file."""

    path: Path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their data.

    Raises:
        ValueError: the file is cut short, is no safetensors file, or holds a type not known here.
    """
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            tensors = [
                StoredTensor(name, part.get_dtype(), tuple(part.get_shape()), path)
                for name, part in parts.items()
            ]
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): fetch it again"
        ) from error
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{path} holds {tensor.name} in {tensor.dtype}, known are {', '.join(DTYPES)}"
            )
    return {tensor.name: tensor for tensor in tensors}


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """Return one whole tensor, whose pages are let go with it."""
    # Opened for one tensor only: the pages of a memory map count as the process's memory.
    with safe_open(tensor.path, "pt") as file:
        return file.get_tensor(tensor.name)


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
