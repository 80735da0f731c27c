"""A plan put to the proof: the same run made for two steps in its own process, and its peak."""

import sys
import tempfile
from collections.abc import Sequence

from lora_grpo.allocator import gives_back
from lora_grpo.own_process import resident_peak, run_alone

STEPS, STEPS_ON_HEAP = 2, 8  # the heap of a narrow model's run fills with holes for some steps
EVALUATED = 2
OWN_FLAGS = ("--json", "--no-json", "--measure", "--no-measure")
TRAIN = (
    "import sys; from lora_grpo.job import run; from lora_grpo.presets import parse_train_config; "
    "from lora_grpo.terminal import run_command; "
    "sys.exit(run_command(lambda: run(*parse_train_config())))"
)


def shortened(arguments: Sequence[str], hidden_size: int) -> list[str]:
    """Return a run's flags, without this script's own, for few steps and little evaluation."""
    kept = [argument for argument in arguments if argument not in OWN_FLAGS]
    steps = STEPS if gives_back(hidden_size) else STEPS_ON_HEAP
    sizes = {"max-steps": steps, "num-eval-items": EVALUATED, "num-validation-items": 0}
    return [*kept, *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))]


def measure(arguments: Sequence[str], hidden_size: int) -> int:
    """Make the shortened run in a process of its own and return its peak resident bytes.

    Raises:
        FailedError: the run failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="lora_grpo-") as folder:
        command = [sys.executable, "-c", TRAIN, *shortened(arguments, hidden_size)]
        command += ["--quiet", "--adapters-dir", folder, "--run-name", "measured"]
        return resident_peak(run_alone(command))
