"""A measured command runs alone, in a process of its own."""

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from lora_grpo.machine.terminal import ROOT, FailedError

EVERY = 0.02  # seconds between two looks at the card


class PeakMemory:
    """Looks at the card's free memory from a thread of its own; on a CPU asks the kernel."""

    def __init__(self, free: Callable[[], int] | None, free_before: int = 0) -> None:
        """`free` gives the card's free bytes, None on a CPU; `free_before` were free at first."""
        self.free, self.free_before, self.least = free, free_before, free_before
        if free is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY)

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


TAIL = 1000  # characters of what a failed command printed


def run_alone(command: Sequence[str]) -> resource.struct_rusage:
    """Run a command to its end, and return what it used.

    Raises:
        FailedError: it failed; the message holds the end of what it printed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(
            list(command), stdout=printed, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            printed.seek(0)
            tail = printed.read().decode(errors="replace").strip()[-TAIL:]
            raise FailedError(f"it ended with status {child.returncode}: {tail}")
    return used


def resident_peak(used: resource.struct_rusage) -> int:
    """Return the largest resident memory of a process, in bytes; Linux counts in KiB, macOS in
    bytes."""
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
