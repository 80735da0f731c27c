"""The doctor: can this machine train, how would it, and what to type to mend what is wrong.

Rows from the machine, the GPU, the packages and the Hub go in; a `Report` comes out, shown as one
screen or as JSON. Nothing heavy is imported in this process: each import is tried in its own.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from lora_grpo.config.presets import PRESETS, choose_preset
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.doctor.machine import Row, gpu_row, hub_row, machine_rows
from lora_grpo.doctor.packages import import_rows, read_pins, version_rows
from lora_grpo.doctor.probes import Outcome, run_probes
from lora_grpo.machine.backend import Choice, choose_backend, installed
from lora_grpo.machine.hardware import GPU, find_gpu
from lora_grpo.machine.terminal import command_line, make_console

Prober = Callable[[Sequence[str], float], dict[str, Outcome]]
MARKS = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "problem": ("FAIL", "bold red")}


@dataclass(frozen=True)
class DoctorConfig:
    """Say whether this machine can train, how it would, and what to type to mend what is wrong."""

    json: bool = False
    """Print one JSON object, for a bug report; it holds no token, no user name, no home path."""
    adapters_dir: Path = Path("adapters")
    """Where adapters would be written."""
    probe_timeout: float = 120.0
    """Seconds after which a process that tries imports is given up."""

    def __post_init__(self) -> None:
        if not 0 < self.probe_timeout < math.inf:
            raise ValueError(f"--probe-timeout must be greater than 0 s, got {self.probe_timeout}")


@dataclass(frozen=True)
class Report:
    """Every row, what a run would choose here and why, and the command that starts it."""

    rows: list[Row]
    preset: str
    why_preset: str
    choice: Choice
    command: str

    @property
    def can_train(self) -> bool:
        return all(row.status != "problem" for row in self.rows)


def examine(config: DoctorConfig, probe: Prober = run_probes) -> Report:
    """Look at everything; `probe` tries imports."""
    gpu = find_gpu()
    preset, why_preset = choose_preset()
    model = PRESETS[preset].get("model", TrainConfig.model)
    extras = ("vllm",) if gpu is None else ("unsloth", "vllm")
    names = ["torch", "bitsandbytes", "trl", *filter(installed, extras)]
    outcomes, tested = probe(names, config.probe_timeout), read_pins()
    rows = [
        *machine_rows(config.adapters_dir),
        gpu_row(gpu, outcomes["torch"]),
        *version_rows(tested, gpu is not None),
        *import_rows(outcomes, tested, gpu is not None),
        hub_row(None if model == "tiny" else model),
    ]
    choice, command = choose(gpu, outcomes)
    return Report(clean(rows), preset, why_preset, choice, command)


def choose(gpu: GPU | None, outcomes: dict[str, Outcome]) -> tuple[Choice, str]:
    """Return what would really work, and the command for it.

    A run chooses by what is installed; where that cannot be imported, the command says otherwise.
    """
    broken = {name for name, outcome in outcomes.items() if outcome.error is not None}
    blind = choose_backend("auto", "auto", gpu)
    choice = choose_backend(
        "auto", "auto", gpu, lambda name: installed(name) and name not in broken
    )
    command = command_line("train_lora.py")
    if choice.backend != blind.backend:
        why = "unsloth is installed, but cannot be imported"
        choice = dataclasses.replace(choice, why_backend=why)
        command += f" --backend {choice.backend}"
    if choice.rollout != blind.rollout:
        why = "vllm is installed, but cannot be imported"
        choice = dataclasses.replace(choice, why_rollout=why)
        command += f" --rollout {choice.rollout}"
    return choice, command


def clean(rows: list[Row]) -> list[Row]:
    """Take from the rows what must not be shown: tokens, passwords, the user's name and home."""
    return [
        dataclasses.replace(row, value=hide(row.value), advice=row.advice and hide(row.advice))
        for row in rows
    ]


def hide(text: str) -> str:
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "[hidden]")
    text = re.sub(r"//[^/@\s]+@", "//", text)
    if (home := str(Path.home())) != "/":
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    name = re.escape(os.environ.get("USER") or "root")
    return re.sub(rf"(?<=/){name}(?![\w.-])", "[user]", text)


def show_progress() -> Status:
    """Return a block that tells a terminal what takes so long."""
    return Console(stderr=True).status("importing the packages, each in a process of its own")


def to_json(report: Report) -> str:
    """Return the report as one JSON object."""
    found = {
        "can_train": report.can_train,
        "preset": report.preset,
        "why_preset": report.why_preset,
        **dataclasses.asdict(report.choice),
        "command": report.command,
        "rows": [dataclasses.asdict(row) for row in report.rows],
    }
    return json.dumps(found, indent=2)


def print_report(report: Report) -> None:
    """Print one screen: the rows, what to do about those that are not right, and the choice."""
    console = make_console()
    console.print(build_table(report.rows))
    advised = [row for row in report.rows if row.advice]
    if advised:
        console.print("What to do")
    for advice in dict.fromkeys(row.advice for row in advised):
        names = dict.fromkeys(row.name for row in advised if row.advice == advice)
        console.print(f"  {', '.join(names)}: {advice}", markup=False, soft_wrap=True)
    choice = report.choice
    for name, value, why in (
        ("preset", report.preset, report.why_preset),
        ("backend", choice.backend, choice.why_backend),
        ("rollout", choice.rollout, choice.why_rollout),
    ):
        console.print(f"{name:<8} {value}: {why}", markup=False, soft_wrap=True)
    if report.can_train:
        console.print(f"It can train: {report.command}", markup=False)
    else:
        console.print("It cannot train yet: mend what is marked FAIL.", markup=False)


def build_table(rows: list[Row]) -> Table:
    """Lay the rows out under the names of their sections."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for column in ("section", "mark", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("value", overflow="fold")
    section = ""
    for row in rows:
        mark, style = MARKS[row.status]
        title = "" if row.section == section else row.section
        table.add_row(Text(title, "bold"), Text(mark, style), row.name, Text(row.value))
        section = row.section
    return table
