"""A plan put to the proof: the same run made for two steps in its own process, and its peak."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lora_grpo.allocator import gives_back

STEPS, STEPS_ON_HEAP = 2, 8  # the heap of a narrow model's run fills with holes for some steps
EVALUATED = 2
OWN_FLAGS = ("--json", "--no-json", "--measure", "--no-measure")
TRAIN = (
    "import sys; from lora_grpo.job import run; from lora_grpo.presets import parse_train_config; "
    "sys.exit(run(*parse_train_config()))"
)


def shortened(arguments: Sequence[str], hidden_size: int) -> list[str]:
    """Return a run's flags, less this script's own, for few steps and hardly any evaluation."""
    kept = [argument for argument in arguments if argument not in OWN_FLAGS]
    steps = STEPS if gives_back(hidden_size) else STEPS_ON_HEAP
    sizes = {"max-steps": steps, "num-eval-items": EVALUATED, "num-validation-items": 0}
    return [*kept, *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))]


def resident_peak(children: resource.struct_rusage) -> int:
    """Return the largest resident memory of a child, in bytes."""
    return children.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(arguments: Sequence[str], hidden_size: int) -> int:
    """Make the shortened run in a process of its own and return its peak resident bytes.

    Raises:
        RuntimeError: the run failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as folder:
        printed = Path(folder) / "printed"
        command = [sys.executable, "-c", TRAIN, *shortened(arguments, hidden_size)]
        command += ["--quiet", "--adapters-dir", folder, "--run-name", "measured"]
        with printed.open("wb") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            tail = printed.read_text(encoding="utf-8", errors="replace").strip()[-1000:]
            raise RuntimeError(f"the measured run ended with status {child.returncode}: {tail}")
    return resident_peak(used)
