"""A task of the user's own: a Python file with `parse` and `same`, or with a reward alone.

`parse(completion)` returns the answer or None, by default what stands between the answer tags.
`same(answer, gold)` returns whether it is right, by default as `--task text`; with `**columns` it
gets the row too. A file with only `reward(completions, **columns)` is a task whose answers are
right where that reward reaches `--accuracy-threshold`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lora_grpo.rewards.calls import LONGEST_SHOWN, Calls, OwnReward, RewardError, describe_error
from lora_grpo.rewards.custom import find_function, import_file
from lora_grpo.tasks.kinds import TaskName, find_task
from lora_grpo.tasks.task import NO_ROW, NUMBER_TASK, Row, Task, between
from lora_grpo.tasks.text import TEXT_TASK, same_text

NAMES = ("parse", "same", "reward")
REMEMBERED = 4096  # rewards of completions, which training asks for twice


@dataclass(frozen=True)
class OwnFile:
    """A task's file, imported at the first use; `sha256` is that of its record, if it has one."""

    path: Path
    sha256: str | None = None

    @cached_property
    def loaded(self) -> tuple[dict[str, Callable[..., Any]], str]:
        """The file's functions by name, and its SHA-256.

        Raises:
            FileNotFoundError, ValueError: it is not there, has changed, or cannot be a task.
        """
        if self.sha256 and not self.path.is_absolute():
            raise ValueError(
                f"the adapter's own task is the file {self.path}, whose code is not run by itself: "
                "give it by evaluate.py --task-file"
            )
        module, sha256 = import_file(self.path, "--task-file")
        if self.sha256 not in (None, sha256):
            raise ValueError(
                f"--task-file {self.path} has other contents than when the adapter was trained: "
                "restore it, or give another by --task-file"
            )
        found = {
            name: getattr(module, name) for name in NAMES if callable(getattr(module, name, 0))
        }
        if not found:
            raise ValueError(
                f"--task-file {self.path} has no function parse, same or reward: write at least "
                "same(answer, gold) or reward(completions, **columns)"
            )
        if "reward" in found:
            find_function(module, str(self.path), "reward", "--task-file")
        return found, sha256

    def get(self, name: str) -> Callable[..., Any] | None:
        return self.loaded[0].get(name)

    def call(self, name: str, *given: Any, **columns: Any) -> Any:
        """Call one of the functions.

        Raises:
            RewardError: it raised; the message shows what it was given.
        """
        try:
            return self.get(name)(*given, **columns)
        except Exception as error:
            raise RewardError(
                f"--task-file {self.path}: {name} raised {describe_error(error)}, given "
                f"{given[0]!r:.{LONGEST_SHOWN}}: mend the function"
            ) from error

    @cached_property
    def by_reward(self) -> bool:
        """Whether the file says by a reward alone what is right."""
        return self.get("parse") is None and self.get("same") is None

    @cached_property
    def asks_row(self) -> bool:
        """Whether `same` takes the row's columns."""
        kinds = [one.kind for one in inspect.signature(self.get("same")).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    @cached_property
    def reward(self) -> OwnReward:
        return OwnReward("reward", self.get("reward"), Calls())


@dataclass(frozen=True)
class OwnTask(Task):
    """A task whose answers a file of the user's own reads, compares or rewards."""

    file: OwnFile = OwnFile(Path())
    threshold: float = 1.0

    @cached_property
    def scores(self) -> dict[tuple[str, str, str], float]:
        """The rewards of the latest completions, by completion, gold answer and question."""
        return {}

    @property
    def sha256(self) -> str:
        return self.file.loaded[1]

    @property
    def reads_tags(self) -> bool:
        """Whether an answer is what stands between the answer tags."""
        return not self.file.by_reward and self.file.get("parse") is None

    def parse(self, completion: str) -> str | None:
        if self.file.get("parse") is None:
            return between(completion, *self.answer)
        answer = self.file.call("parse", completion)
        return None if answer is None else str(answer)

    def score(self, completion: str, gold: str, row: Row = NO_ROW) -> float:
        """Return what the file's reward pays, or 1 for a right answer."""
        if not self.file.by_reward:
            return float(self.is_right(completion, gold, row))
        key = (completion, gold, str(row.get("question")))
        if key not in self.scores:
            columns = {name: [value] for name, value in {**row, "answer": gold}.items()}
            columns.pop("completions", None)
            [value] = self.file.reward(completions=[completion], **columns)
            if len(self.scores) >= REMEMBERED:
                self.scores.clear()
            self.scores[key] = value or 0.0
        return self.scores[key]

    def is_right(self, completion: str, gold: str, row: Row = NO_ROW) -> bool:
        """Return whether the answer is the gold one, or the reward reaches the threshold."""
        if self.file.by_reward:
            return self.score(completion, gold, row) >= self.threshold
        return super().is_right(completion, gold, row)

    def is_right_anywhere(self, completion: str, gold: str, row: Row = NO_ROW) -> bool:
        """Return whether the last answer anywhere is right; the file's own `parse` and `reward`
        read whole completions already."""
        if not self.reads_tags:
            return self.is_right(completion, gold, row)
        return super().is_right_anywhere(completion, gold, row)


def own_task(path: Path, threshold: float, sha256: str | None = None) -> OwnTask:
    """Return the task of a file, which is imported when it is first asked or checked."""
    file = OwnFile(path, sha256)

    def compare(answer: str, gold: str, row: Row) -> bool:
        if file.get("same") is None:
            return same_text(answer, gold)
        columns = {name: value for name, value in row.items() if name != "answer"}
        return bool(file.call("same", answer, gold, **(columns if file.asks_row else {})))

    return OwnTask(
        name="own",
        noun="answer",
        compare=compare,
        can_read=lambda text: True,
        find_last=TEXT_TASK.find_last,
        needs_row=True,
        check=lambda: file.loaded and None,
        file=file,
        threshold=threshold,
    )


class TaskFlags(Protocol):
    """A configuration with the flags that name a task."""

    task: TaskName
    task_file: Path | None
    accuracy_threshold: float


def choose_by_flags(config: TaskFlags) -> Task | None:
    """Return the task that a configuration asks for, None for `auto`."""
    if config.task_file is None:
        return find_task(config.task)
    return own_task(config.task_file.expanduser(), config.accuracy_threshold)


def recall_task(trained: dict[str, Any]) -> Task:
    """Return the task that `train_config.json` records; older runs were of numbers."""
    if trained.get("task") == "own":
        threshold = trained.get("accuracy_threshold") or 1.0
        return own_task(Path(trained["task_file"]), threshold, trained.get("task_sha256"))
    return find_task(trained.get("task") or NUMBER_TASK.name) or NUMBER_TASK
