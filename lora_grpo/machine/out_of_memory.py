"""Out of memory is not the end: the same work again on fewer rows at once, until it fits.

Fewer rows at once change the memory and the time, never the result: the caller adds up the parts.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from lora_grpo.machine.terminal import FailedError

Result = TypeVar("Result")


# CUDA's own words, cuBLAS's and the CPU allocator's; not every one comes as OutOfMemoryError.
SIGNS = ("out of memory", "alloc_failed", "can't allocate memory")


UPDATE = "the update"


class MemoryExhaustedError(FailedError):
    """Not even one row at a time fits; `work` is what was being done, such as `UPDATE`."""

    def __init__(self, work: str, reason: str) -> None:
        super().__init__(f"out of memory in {work}, {reason}")
        self.work = work


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU's or the machine's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)


def release_memory() -> None:
    """Free what nothing refers to any more, and return the blocks that PyTorch and the C library
    keep."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_part(whole: int, limit: int) -> int:
    """Return the largest size of equal parts of `whole` rows that is not above `limit`."""
    return next(size for size in range(min(whole, limit), 0, -1) if whole % size == 0)


class RowLimit:
    """How many rows of one kind of work fit at once; halved for good when memory runs out."""

    def __init__(
        self,
        work: str,
        say: Callable[[str], None],
        release: Callable[[], None] = release_memory,
        keeps: str = "the result is the same",
    ) -> None:
        self.work, self.say, self.release, self.keeps = work, say, release, keeps
        self.limit: int | None = None

    def run(
        self,
        job: Callable[[int], Result],
        whole: int,
        at_most: int | None = None,
        at_least: int = 1,
    ) -> Result:
        """Return `job(rows)` for the most rows at once that fit; it must do all of `whole` rows.

        Raises:
            MemoryExhaustedError: the fewest rows at a time do not fit either.
        """
        while True:
            rows = largest_part(whole, min(self.limit or whole, at_most or whole))
            try:
                return job(rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            # Only here, with the error gone, does nothing refer to the failed work's tensors.
            self.release()
            if rows <= at_least:
                fewest = "one at a time" if rows == 1 else f"{rows} at a time"
                raise MemoryExhaustedError(self.work, f"{fewest}: {reason}")
            self.limit = largest_part(whole, rows // 2)
            self.say(
                f"out of memory in {self.work} with {rows} completions at once: retrying with "
                f"{self.limit} at once, {whole // self.limit} times; {self.keeps}"
            )
