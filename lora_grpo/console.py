"""What a person sees of a run: the plan, a line a step, a completion now and then, the final table.

On a terminal a progress bar stands below the lines; elsewhere the lines alone, so that a log file
reads well.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_grpo.atomic import read_jsonl
from lora_grpo.memory import GIB

if TYPE_CHECKING:
    from lora_grpo.batch import Batch

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
            self.say_always(text)

    def say_always(self, text: str) -> None:
        """Print a line, quiet or not."""
        self.console.print(text, markup=False, soft_wrap=True)

    def plan(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Print what will happen."""
        if self.quiet:
            return
        table = Table(
            title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self.console.print(table)

    @contextmanager
    def bar(self, name: str, total: int):
        """Show a bar on a terminal while the block runs; yields a function that advances it."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=self.quiet or not self.console.is_terminal,
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)

    def step(self, row: dict[str, Any], batch: "Batch", total: int, every: int) -> None:
        """Print a step's line, and a completion at intervals."""
        step = row["step"]
        self.first_step = step if self.first_step is None else self.first_step
        if step % max(1, total // LINES) == 0 or step in (self.first_step, total):
            self.say(self.step_line(row, batch, total))
        if step % every == 0:
            self.sample(batch)

    def step_line(self, row: dict[str, Any], batch: "Batch", total: int) -> str:
        done = row["step"] - self.first_step + 1
        left = (time.perf_counter() - self.started) / done * (total - row["step"])
        speed = row["tokens_per_second_generate"] or 0.0
        drawn = f" ({row['drawn_groups']} groups drawn)" if batch.dropped_completions else ""
        return (
            f"step {row['step']:>{len(str(total))}}/{total}  reward {row['reward']:.3f}  "
            f"correct {percent(row['correct']):>7}  format {percent(row['format']):>7}  "
            f"length {row['completion_length']:5.1f}  clipped {percent(row['clipped_ratio']):>6}  "
            f"dead groups {percent(row['frac_reward_zero_std']):>7}{drawn}  "
            f"{speed:5.0f} tokens/s  "
            f"{row['seconds']:.1f} s  {format_seconds(left)} left"
        )

    def sample(self, batch: "Batch") -> None:
        """Print the first completion of the batch with what it earned."""
        if self.quiet:
            return
        earned = "  ".join(
            f"{name} {'n/a' if scores[0] is None else format(scores[0], '.2f')}"
            for name, scores in batch.rewards.items()
        )
        body = (
            f"{batch.questions[0]}\n\n{batch.completions[0]}\n\ngold {batch.answers[0]}  |  "
            f"{earned}"
        )
        self.console.print(Panel(escape(body), title="a completion", title_align="left", width=100))

    def before(self, base: dict[str, Any]) -> None:
        """Print how the base does, before anything is trained."""
        self.say(
            f"base: strict {percent(base['strict_accuracy'])}, lenient "
            f"{percent(base['lenient_accuracy'])}, "
            f"format {percent(base['format_rate'])}"
        )
        self.started = time.perf_counter()

    def validation(self, row: dict[str, Any]) -> None:
        """Print how a step does on the validation problems."""
        self.say(
            f"validation after step {row['step']}: strict {percent(row['strict_accuracy'])}, "
            f"format {percent(row['format_rate'])}"
        )

    def memory(self, metrics: Path) -> None:
        """Print the peak memory of a run beside what was predicted for it."""
        row = read_jsonl(metrics)[-1]
        measured, predicted = row["peak_memory_bytes"], row["predicted_memory_bytes"]
        beside = f", {predicted / GIB:.2f} GB predicted" if predicted else ""
        self.say(f"peak memory: {measured / GIB:.2f} GB measured{beside}")

    def results(self, report: dict[str, Any]) -> None:
        """Print base and adapter side by side."""
        models = [name for name in ("base", "adapter") if name in report]
        name = f"{report['dataset']} ({report['split']})"
        self.say_always(f"{report['num_items']} problems of {name}, greedy")
        table = Table()
        table.add_column("")
        for name in models:
            table.add_column(name if "adapter" in models else "model", justify="right")
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
