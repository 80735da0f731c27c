"""Mathematics: formulas in LaTeX, equal by math-verify, which is an optional dependency.

Numbers and equal texts are compared at once. Anything else goes to a child process, which is killed
and started anew where an expression takes it too long: `9^{9^{9^9}}` is easily written.
"""

import atexit
import json
import re
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

from lora_grpo.tasks.numbers import last_number, parse_number, same_number
from lora_grpo.tasks.task import Row, Task, between

WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS, ANSWER_SECONDS, LONGEST = 120, 10, 500
FENCES = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Two answers, or words around one.
HEDGE = re.compile(r"\$|\\boxed|\b(?:or|and|either|is|answer)\b")
COMMAND_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{[^{}]*\}")
# An operation that is left to do, as in 24*3 for 72; a power of ten and a fraction are none.
OPERATION = re.compile(
    r"(?<=[\w)}\]])\s*(?:[+*-]|\\cdot|\\times(?!\s*10\s*\^)|\\div|\\pm)\s*(?=[\w({\\])"
    r"|!|\\(?:sum|prod|int|binom)\b"
)


class Worker:
    """The child process, started at the first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, answer: str) -> bool:
        """Return whether the child finds two formulas equal; False where it fails or takes too
        long."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return False
        return self.read_line(ANSWER_SECONDS) == "true"

    def start(self) -> None:
        """Start the child.

        Raises:
            ValueError: math-verify cannot be imported.
        """
        check_installed()
        # -P keeps this folder off the child's path, where `numbers` would hide Python's own.
        command = [sys.executable, "-P", str(WORKER)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run, which ends the child itself
        )
        atexit.register(self.stop)
        if self.read_line(START_SECONDS) != "ready":
            raise ValueError(f"--task math: {' '.join(command)} did not start: run it to see why")

    def read_line(self, seconds: float) -> str:
        """Return the child's next line; after too long, or where it has ended, end it."""
        with DefaultSelector() as selector:
            selector.register(self.process.stdout, EVENT_READ)
            line = self.process.stdout.readline() if selector.select(seconds) else ""
        if not line:
            self.stop()
        return line.strip()

    def stop(self) -> None:
        """End the child."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
            atexit.unregister(self.stop)


WORKER_OF_RUN = Worker()


def check_installed() -> None:
    """Raise a ValueError unless math-verify is installed."""
    if find_spec("math_verify") is None:
        raise ValueError(
            "--task math needs math-verify, which is not installed: pip install 'lora-grpo[math]' "
            "or pip install math-verify==0.9.0; --task number pays numbers, and --task text what "
            "is written alike"
        )


def unwrap(text: str) -> str:
    r"""Return a formula without the dollars or the `\boxed{}` that are around all of it."""
    text = text.strip().rstrip(".").strip()
    for opening, closing in FENCES:
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(inner) == len(text) - len(opening) - len(closing) and inner:
            return unwrap(inner)
    found = BOX.match(text)
    if found and closing_brace(text, found.end()) == len(text) - 1:
        return unwrap(text[found.end() : -1])
    return text


def closing_brace(text: str, begin: int) -> int | None:
    """Return where the brace is closed that was opened just before `begin`."""
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return None


def same_formula(answer: str, gold: str) -> bool:
    """Return whether an answer is one formula that equals the gold one, and worked out where that
    is a number."""
    answer, gold = unwrap(answer), unwrap(gold)
    if not answer or len(answer) > LONGEST or len(gold) > LONGEST:
        return False
    if squeeze(answer) == squeeze(gold):
        return True
    if parse_number(answer) is not None and parse_number(gold) is not None:
        return same_number(answer, gold)
    if HEDGE.search(COMMAND_TEXT.sub("", answer)):
        return False
    if parse_number(gold) is not None and OPERATION.search(answer):
        return False
    return ask(gold, answer)


def squeeze(text: str) -> str:
    return re.sub(r"\s+|\\[,;!]|\\left|\\right", "", text).replace("dfrac", "frac")


@lru_cache(maxsize=2**16)
def ask(gold: str, answer: str) -> bool:
    """Return what the child says; remembered, as the reward and the metrics ask the same."""
    return WORKER_OF_RUN.ask(gold, answer)


def last_formula(completion: str) -> str | None:
    r"""Return what stands in the answer tags, else the last `\boxed{}`, `$...$` or number."""
    tagged = between(completion, *Task.answer)
    if tagged is not None:
        return tagged
    boxes = list(BOX.finditer(completion))
    end = closing_brace(completion, boxes[-1].end()) if boxes else None
    if end is not None:
        return completion[boxes[-1].end() : end]
    formulas = re.findall(r"\$([^$]+)\$", completion)
    return formulas[-1] if formulas else last_number(completion)


def compare(answer: str, gold: str, row: Row) -> bool:
    return same_formula(answer, gold)


MATH_TASK = Task(
    name="math",
    noun="formula",
    compare=compare,
    can_read=lambda text: bool(unwrap(text)),
    find_last=last_formula,
    instruction="The answer is one number or formula in LaTeX, worked out, without words.",
    check=check_installed,
)
