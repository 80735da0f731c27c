"""The most memory that a run has held: on a GPU what the card itself counts, sampled while the run
goes on, since PyTorch's own count takes what a sleeping vLLM has given back as held; else resident.
"""

import resource
import threading
from collections.abc import Callable

from lora_grpo.own_process import resident_peak

EVERY = 0.02  # seconds between two looks at the card


class PeakMemory:
    """Looks at the card's free memory from a thread of its own; on a CPU asks the kernel."""

    def __init__(self, free: Callable[[], int] | None, free_before: int = 0) -> None:
        """`free` gives the card's free bytes, None on a CPU; `free_before` were free at first."""
        self.free, self.free_before, self.least = free, free_before, free_before
        if free is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(EVERY):
            self.look()

    def look(self) -> None:
        """Take the card's free memory into account as it is now."""
        self.least = min(self.least, self.free())

    def bytes(self) -> int | None:
        """Return the peak so far, in bytes, or None where nothing of it was seen."""
        if self.free is None:
            return resident_peak(resource.getrusage(resource.RUSAGE_SELF))
        self.look()
        return max(self.free_before - self.least, 0) or None


def watch_memory(device: str, free_before: int) -> PeakMemory:
    """Begin to watch the memory of a run on this device; `free_before` bytes of the card were free
    when the process began, 0 where that is not known."""
    if device != "cuda":
        return PeakMemory(None)
    import torch

    free = torch.cuda.mem_get_info()[0]
    return PeakMemory(lambda: torch.cuda.mem_get_info()[0], free_before or free)
