"""How a run on a CPU gives memory back: settings of the C library around the update.

By default glibc keeps freed tensors of up to 32 MB in its heap, in holes that aligned requests of
the same size do not fit, so a training process grows to about half as much again as it holds.
Mapping each tensor of the update on its own gives it back when it is freed; huge pages keep that
quick. Generation, whose many small tensors come and go, stays on the heap, and so does the whole
run of a narrow model: it does too little arithmetic with each byte to pay for fresh pages.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

M_MMAP_THRESHOLD = -3  # malloc.h
# Smaller tensors cost more time in page faults than the little that they give back is worth.
MAPPED_FROM = 2**22
LARGEST_ON_HEAP = 2**25  # to where glibc's own threshold grows
NARROW = 256  # hidden states of fewer numbers: an update would take up to twice as long
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def has_huge_pages() -> bool:
    """Return whether the kernel gives huge pages to a program that asks for them."""
    try:
        return "[never]" not in HUGE_PAGES.read_text(encoding="ascii")
    except OSError:
        return False


def prepare_allocator() -> None:
    """Let torch ask for huge pages from 2 MiB on; call it before the first tensor is made."""
    if has_huge_pages():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def gives_back(hidden_size: int, device: str = "cpu") -> bool:
    """Return whether the update of a model of this width gives freed memory back here."""
    return device == "cpu" and hidden_size >= NARROW and has_huge_pages()


@contextmanager
def giving_back(hidden_size: int, device: str = "cpu") -> Iterator[bool]:
    """Map every tensor of 4 MiB and more that the block makes; yield whether that is done."""
    library = ctypes.CDLL(None) if gives_back(hidden_size, device) else None
    if not hasattr(library, "mallopt"):  # musl has none
        yield False
        return
    library.malloc_trim(0)
    library.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    try:
        yield True
    finally:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
