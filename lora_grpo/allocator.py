"""How this process gives memory back: a setting of the C library for runs on a CPU.

By default glibc keeps freed tensors of up to 32 MB in its heap, in holes that aligned requests of
the same size do not fit, so a training process grows to about half as much again as it holds.
Mapping each large tensor on its own gives it back when it is freed; huge pages keep that quick.
"""

import ctypes
import os
from pathlib import Path

M_MMAP_THRESHOLD = -3  # malloc.h
# 4 MiB: from 256 KiB on, a step of the embedded model took more than twice as long.
MAPPED_FROM = 2**22
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_huge_pages() -> bool:
    """Tell whether the kernel gives huge pages to a program that asks for them."""
    try:
        return "[never]" not in HUGE_PAGES.read_text(encoding="ascii")
    except OSError:
        return False


def give_back_freed_memory() -> bool:
    """Map every tensor of 4 MiB and more on its own; tell whether that was done.

    Call it before the first tensor is made: from 2 MiB on torch asks for huge pages if it finds
    `THP_MEM_ALLOC_ENABLE`. Does nothing without huge pages, where it would cost time, or without
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or not has_huge_pages():
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return mallopt(M_MMAP_THRESHOLD, MAPPED_FROM) == 1
