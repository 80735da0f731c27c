"""A measured command runs alone, in a process of its own."""

import os
import resource
import subprocess
import tempfile
from collections.abc import Sequence

TAIL = 1000  # characters of what a failed command printed


def run_alone(command: Sequence[str]) -> resource.struct_rusage:
    """Run a command to its end, and return what it used.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(list(command), stdout=printed, stderr=subprocess.STDOUT)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            printed.seek(0)
            tail = printed.read().decode(errors="replace").strip()[-TAIL:]
            raise RuntimeError(f"it ended with status {child.returncode}: {tail}")
    return used
