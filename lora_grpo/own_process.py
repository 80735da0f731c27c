"""A measured command runs alone, in a process of its own."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from lora_grpo.terminal import ROOT, FailedError

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
