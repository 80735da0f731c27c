"""What a terminal shows below a run's lines while it trains: progress, the reward, a completion.

Nothing of it stays on the screen afterwards. Its lines are short and have no frame, so that a
window that is made narrower need not break them.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_grpo.grpo.batch import Batch
from lora_grpo.machine.terminal import printable

REFRESHES = 4  # per second
WIDEST, INDENT = 76, 2
SHOWN_LINES = 10  # of a completion; a low window shows fewer
SPEED_PERIOD = 3600.0  # seconds of which the speed is the mean: steps may take minutes
LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a series as one row of bars from its lowest to its highest value; of more values than
    fit, a bar is the mean of several."""
    size = -(-len(values) // width) or 1
    means = [fmean(values[at : at + size]) for at in range(0, len(values), size)]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    top = len(LEVELS) - 1
    return "".join(LEVELS[round(top * (mean - low) / span) if span else 0] for mean in means)


def shorten(lines: Sequence[Text], count: int) -> list[Text]:
    """Return the first and the last of the lines, with what is left out counted between them."""
    if len(lines) <= count:
        return list(lines)
    head, tail = count // 2, count - count // 2 - 1
    left_out = Text(f"... {len(lines) - head - tail} lines ...", "dim")
    return [*lines[:head], left_out, *lines[len(lines) - tail :]]


@lru_cache(maxsize=1)
def lay_out(console: Console, shown: Sequence[str], width: int, count: int) -> Group:
    """Return a question, its completion in `count` lines at most, and what it earned."""
    lines = []
    for text, limit, style in zip(shown, (2, count, 2), ("dim", "", "dim"), strict=True):
        whole = Text(printable(text.strip()), style)
        lines += shorten(whole.wrap(console, max(8, width - INDENT)), limit)
    return Group(*(Text(" " * INDENT).append_text(line) for line in lines))


class LiveView:
    """A block below the printed lines, redrawn while the run trains; a context manager."""

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self.console = console
        self.rewards: list[float] = []
        self.shown: tuple[str, str, str] | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=SPEED_PERIOD,
        )
        self.steps = self.progress.add_task("steps", total=total, completed=done)
        self.live = Live(
            console=console,
            get_renderable=self.draw,
            refresh_per_second=REFRESHES,
            redirect_stderr=sys.stderr.isatty(),
            transient=True,
        )
        self.stack = ExitStack()

    def __enter__(self) -> "LiveView":
        self.stack.enter_context(self.live)
        self.stack.enter_context(lead_loggers())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stack.close()

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Any]:
        """Show a second bar while the block runs; yields a function that advances it."""
        task = self.progress.add_task(name, total=total)
        try:
            yield lambda count: self.progress.advance(task, count)
        finally:
            self.progress.remove_task(task)

    def update(self, row: dict[str, Any], batch: Batch, earned: str) -> None:
        """Take in a step: its row of `metrics.jsonl`, its completions, and what the first one
        earned."""
        self.progress.update(self.steps, completed=row["step"])
        if (reward := row.get("reward")) is not None:
            self.rewards.append(reward)
        if batch.completions:
            self.shown = (batch.questions[0], batch.completions[0], earned)

    def draw(self) -> Group:
        """Return the block for the window as it is now."""
        width = min(WIDEST, self.console.width - 1)
        parts: list[Any] = [self.progress.get_renderable()]
        if self.rewards:
            label = f"reward {self.rewards[-1]:.3f} "
            parts.append(Text(label + sparkline(self.rewards, max(8, width - len(label)))))
        if self.shown:
            count = max(3, min(SHOWN_LINES, self.console.height // 3))
            parts.append(lay_out(self.console, self.shown, width, count))
        return Group(*parts)


@contextmanager
def lead_loggers() -> Iterator[None]:
    """Let handlers of `logging` write where sys.stdout and sys.stderr now go: above the block.

    Each keeps the stream of the moment it was made, which would write across the block.
    """
    now = {id(sys.__stdout__): sys.stdout, id(sys.__stderr__): sys.stderr}
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    moved = [
        (handler, handler.setStream(now[id(handler.stream)]))
        for handler in {
            handler for logger in loggers for handler in getattr(logger, "handlers", ())
        }
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in now
    ]
    try:
        yield
    finally:
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)
