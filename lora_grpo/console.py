"""What a person sees of a run: the plan, a line a step, a completion now and then, the final table.

On a terminal a progress bar stands below the lines; elsewhere the lines alone, so that a log file
reads well.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from lora_grpo.grpo import Batch

LINES = 50
LOG_WIDTH = 120


def format_seconds(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


class Display:
    """Prints a run to one console; a quiet one prints only warnings and the final table."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self.quiet = quiet
        self.progress: Progress | None = None
        self.started = time.perf_counter()
        self.first_step: int | None = None

    def say(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def plan(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Print what will happen."""
        if self.quiet:
            return
        name = f"{report['dataset']} ({report['split']})"
        self.console.print(f"{report['num_items']} problems of {name}, greedy", markup=False)
        table = Table()
        table.add_column("")
        for name in models:
            table.add_column(name, justify="right")
        for label, cell in ROWS:
            table.add_row(label, *(cell(report[name]) for name in models))
        self.console.print(table)
        if "mcnemar_p" in report:
            self.console.print(
                f"McNemar's exact test of the two on the same items: p = {report['mcnemar_p']:.2g}"
            )


ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("strict accuracy", lambda model: percent(model["strict_accuracy"])),
    (
        "95 % interval",
        lambda model: f"{100 * model['ci95'][0]:.1f} to {100 * model['ci95'][1]:.1f} %",
    ),
    ("lenient accuracy", lambda model: percent(model["lenient_accuracy"])),
    ("format", lambda model: percent(model["format_rate"])),
    ("truncated", lambda model: percent(model["truncated_rate"])),
    ("tokens a completion", lambda model: f"{model['mean_completion_tokens']:.1f}"),
]
