"""Out of memory is not the end: the same work again on fewer rows at once, until it fits.

Fewer rows at once change the memory and the time, never the result: the caller adds up the parts.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

Result = TypeVar("Result")


class MemoryExhaustedError(RuntimeError):
    """Not even one row at a time fits."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a GPU's or the machine's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and should_reduce_batch_size(error)
    )


def release_memory() -> None:
    """Drop what nothing refers to any more, and give PyTorch's cached blocks back."""
    gc.collect()
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
    ) -> None:
        self.work, self.say, self.release = work, say, release
        self.limit: int | None = None

    def run(self, job: Callable[[int], Result], whole: int, at_most: int | None = None) -> Result:
        """Return `job(rows)` for the most rows at once that fit; it must do all of `whole` rows.

        Raises:
            MemoryExhaustedError: one row at a time does not fit either.
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
            if rows == 1:
                raise MemoryExhaustedError(f"out of memory in {self.work}, one at a time: {reason}")
            self.limit = largest_part(whole, rows // 2)
            self.say(
                f"out of memory in {self.work} with {rows} completions at once: going on with "
                f"{self.limit} at once, {whole // self.limit} times; the result is the same"
            )
