"""What a run prints: the plan, one line per step, a completion at intervals, and the final table.

A terminal shows progress, reward and completions in a block below the lines (`live.py`); a log file
gets the lines only.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_grpo.diagnosis.rules import Finding
from lora_grpo.grpo.batch import Batch
from lora_grpo.machine.terminal import can_redraw, make_console, printable
from lora_grpo.memory.terms import GIB
from lora_grpo.results.scoring import STARTS, list_models
from lora_grpo.train.live import LiveView

LINES = 50
WORDS = (
    "strict: the answer between the tags is right; lenient: the last one anywhere in the text is",
    "clipped: completions cut off at --max-completion-length, before their end",
    "dead groups: those whose completions all earned the same, so that nothing is learnt from them",
)


def format_seconds(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None, form: str) -> str:
    """Return a figure in a format, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def percent(share: float | None) -> str:
    shown = number(None if share is None else 100 * share, ".1f")
    return shown if shown == "-" else f"{shown} %"


def interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f} %"


class Display:
    """Prints a run to one console; a quiet one prints only warnings and the final table."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = make_console(console)
        self.quiet = quiet
        self.view: LiveView | None = None
        self.known: set[str] = set()  # the figures that had a value in some step
        self.started = time.perf_counter()
        self.first_step: int | None = None
        self.max_minutes: float | None = None

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
    def training(self, total: int, done: int = 0) -> Iterator[None]:
        """Show the steps' progress, reward and completions on a terminal while the block runs;
        `done` were made before."""
        if self.quiet or not can_redraw(self.console):
            yield
            return
        try:
            with LiveView(self.console, total, done) as self.view:
                yield
        finally:
            self.view = None

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar on a terminal while the block runs; yields a function that advances it."""
        if self.view:
            with self.view.bar(name, total) as advance:
                yield advance
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=self.quiet or not can_redraw(self.console),
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)

    def step(self, row: dict[str, Any], batch: Batch, total: int, every: int) -> None:
        """Print one line for a step, and one of its completions every `every` steps."""
        step = row["step"]
        self.first_step = step if self.first_step is None else self.first_step
        self.known |= {name for name, value in row.items() if value is not None}
        if step % max(1, total // LINES) == 0 or step in (self.first_step, total):
            self.say(self.step_line(row, batch, total))
        if self.view:
            self.view.update(row, batch, describe_first(batch))
        elif step % every == 0:
            self.sample(batch)

    def step_line(self, row: dict[str, Any], batch: Batch, total: int) -> str:
        """Return a step's figures; one that no step of the run had yet has no column."""
        done = row["step"] - self.first_step + 1
        left = (time.perf_counter() - self.started) / done * (total - row["step"])
        if self.max_minutes is not None:
            left = min(left, max(0.0, 60 * self.max_minutes - row["elapsed_seconds"]))
        drawn = f" ({row['drawn_groups']} groups drawn)" if batch.dropped_completions else ""
        share = {name: percent(row.get(name)) for name in SHARES}
        speed = number(row.get("tokens_per_second_generate"), ".0f")
        columns = {
            "reward": f"reward {number(row.get('reward'), '.3f'):>5}",
            "correct": f"correct {share['correct']:>7}",
            "format": f"format {share['format']:>7}",
            "completion_length": f"length {number(row.get('completion_length'), '.1f'):>5}",
            "clipped_ratio": f"clipped {share['clipped_ratio']:>6}",
            "frac_reward_zero_std": f"dead groups {share['frac_reward_zero_std']:>7}{drawn}",
            "tokens_per_second_generate": f"{speed:>5} tokens/s",
        }
        figures = "  ".join(text for name, text in columns.items() if name in self.known)
        return (
            f"step {row['step']:>{len(str(total))}}/{total}  {figures}  "
            f"{number(row.get('seconds'), '.1f')} s  {format_seconds(left)} left"
        )

    def sample(self, batch: Batch) -> None:
        """Print the first completion of the batch with its rewards."""
        if self.quiet or not batch.completions:
            return
        body = f"{batch.questions[0]}\n\n{batch.completions[0]}\n\n{describe_first(batch)}"
        panel = Panel(escape(printable(body)), title="a completion", title_align="left", width=100)
        self.console.print(panel)

    def before(self, name: str, model: dict[str, Any]) -> None:
        """Print a model's accuracy, before GRPO has trained anything."""
        self.say(
            f"{name}: strict {percent(model['strict_accuracy'])}, lenient "
            f"{percent(model['lenient_accuracy'])}, "
            f"format {percent(model['format_rate'])}"
        )

    def sft_step(self, row: dict[str, Any], total: int) -> None:
        """Print one line for a step of supervised fine-tuning."""
        if row["step"] % max(1, total // LINES) == 0 or row["step"] in (1, total):
            self.say(
                f"sft step {row['step']:>{len(str(total))}}/{total}  "
                f"loss {number(row['loss'], '.3f')}  {number(row['seconds'], '.1f')} s"
            )

    def begin(self, explain: bool = True) -> None:
        """Say what the words of the steps' lines mean, and start the clock."""
        self.say(
            "base, validation and the final table are greedy decoding, one completion per problem; "
            "the lines of the steps are completions sampled for training"
        )
        for line in WORDS if explain else ():
            self.say(line)
        self.started = time.perf_counter()

    def validation(self, row: dict[str, Any], kept: bool) -> None:
        """Print a step's accuracy on the validation problems, and whether its adapter is kept."""
        self.say(
            f"validation after step {row['step']}: {describe_validation(row)}, "
            f"format {percent(row['format_rate'])}: "
            f"{'the best so far, kept' if kept else 'an earlier step did better'}"
        )

    def chosen(
        self, run_dir: Path, step: int, steps: int, validation: list[dict[str, Any]]
    ) -> None:
        """Print where the adapter is, of which step it is, and why of that one."""
        row = next((row for row in validation if row["step"] == step), None)
        why = ""
        if row:
            why = f", the best of {len(validation)} validated: {describe_validation(row)}"
            if step == 0:
                why += "; no step of GRPO did better than what it started from"
        if step != steps:
            why += f"; the adapter of step {steps} is in {run_dir / 'last'}"
        self.say(f"adapter of step {step} of {steps}: {run_dir}{why}")

    def findings(self, findings: Iterable[Finding]) -> None:
        """Print what the diagnosis found."""
        for finding in findings:
            self.say_always(f"diagnosis: {finding}")

    def memory(self, row: dict[str, Any]) -> None:
        """Print the measured and the predicted peak memory, from the last row of the metrics."""
        measured, predicted = row.get("peak_memory_bytes"), row.get("predicted_memory_bytes")
        beside = f", {predicted / GIB:.2f} GB predicted" if predicted else ""
        found = f"{measured / GIB:.2f} GB measured" if measured else "not measured"
        self.say(f"peak memory: {found}{beside}")

    def results(self, report: dict[str, Any]) -> None:
        """Print base and adapter side by side."""
        models = list_models(report)
        name = f"{report['dataset']} ({report['split']})"
        self.say_always(f"{report['num_items']} problems of {name}, greedy")
        table = Table()
        table.add_column("")
        for words in models.values():
            table.add_column(words if "adapter" in models else "model", justify="right")
        for label, cell in ROWS:
            table.add_row(label, *(cell(report[name]) for name in models))
        if sampled := report.get("sampled"):
            table.add_section()
            for figure in sampled["base"]["ci95"]:
                table.add_row(figure, *(with_interval(sampled[name], figure) for name in models))
        self.console.print(table)
        if "mcnemar_p" in report:
            self.console.print(
                "McNemar's exact test of adapter and base on the same items: "
                f"p = {report['mcnemar_p']:.2g}"
            )
        for name, words in STARTS.items():
            if (p := report.get(f"mcnemar_p_{name}")) is not None:
                self.console.print(f"the same of adapter and {words}: p = {p:.2g}")
        if sampled:
            self.say_always(describe_sampling(sampled))


def with_interval(sampled: dict[str, Any], figure: str) -> str:
    """Return a sampled figure and its 95 % interval."""
    return f"{percent(sampled[figure])} ({interval(sampled['ci95'][figure])})"


def describe_first(batch: Batch) -> str:
    """Return the gold answer of the batch's first completion, and what each reward pays it."""
    earned = (f"{name} {number(scores[0], '.2f')}" for name, scores in batch.rewards.items())
    return f"gold {batch.answers[0]}  |  {'  '.join(earned)}"


def describe_validation(row: dict[str, Any]) -> str:
    """Return the accuracy in a row of `validation.jsonl`."""
    accuracy = f"strict {percent(row['strict_accuracy'])} of {row['num_items']} problems"
    return f"{accuracy} (95 % interval {interval(row['ci95'])})"


def describe_sampling(sampled: dict[str, Any]) -> str:
    """Return how the completions of pass@k and maj@k were sampled."""
    p = sampled.get("mcnemar_p")
    paired = "" if p is None else f"; McNemar's test of maj@{sampled['num_samples']}: p = {p:.2g}"
    return (
        f"pass@k and maj@k, with 95 % intervals: {sampled['num_samples']} completions per problem, "
        f"temperature {sampled['temperature']:g}, seed {sampled['seed']}{paired}"
    )


SHARES = ("correct", "format", "clipped_ratio", "frac_reward_zero_std")
ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("strict accuracy", lambda model: percent(model["strict_accuracy"])),
    ("95 % interval", lambda model: interval(model["ci95"])),
    ("lenient accuracy", lambda model: percent(model["lenient_accuracy"])),
    ("format", lambda model: percent(model["format_rate"])),
    ("truncated", lambda model: percent(model["truncated_rate"])),
    ("tokens per completion", lambda model: f"{model['mean_completion_tokens']:.1f}"),
]
