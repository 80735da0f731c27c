"""The history of a run: its steps, validations, sampled completions, evaluation and settings.

Read from an adapter directory of this project, or from what any TRL trainer leaves: a checkpoint's
`trainer_state.json`, or a saved `trainer.state.log_history`. The rows of both become those of
`metrics.jsonl`.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_grpo.machine.files import read_json, read_jsonl
from lora_grpo.policy.adapter import COMPLETIONS, EVAL, METRICS, TRAIN_CONFIG, VALIDATION

Row = dict[str, Any]
TRAINER_STATE = "trainer_state.json"
WINDOW = 5  # steps over which figures are averaged
# TRL's names for the figures of a step, except those that are alike.
TRL_NAMES = {
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_ratio",
    "sampling/sampling_logp_difference/mean": "sampler_logprob_difference",
    "sampling/importance_sampling_ratio/mean": "sampler_ratio",
}
# TRL counts a group as alive whose rewards differ by their rounding alone.
SAME_REWARD = 1e-6
# What a reward function's name says of it, where it pays between 0 and 1.
TELLING = {"correct": r"correct|accura", "format": "format"}


@dataclass(frozen=True)
class History:
    """What is known of a run so far.

    `steps` are rows of `metrics.jsonl` in order; `settings` is `train_config.json`, empty for a run
    of another trainer; `completions` are the logged ones, a group's beside each other.
    """

    steps: list[Row]
    settings: Row = field(default_factory=dict)
    validations: list[Row] = field(default_factory=list)
    completions: list[Row] = field(default_factory=list)
    evaluation: Row = field(default_factory=dict)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return (step, figure) for each step that has the figure."""
        return [(row["step"], row[name]) for row in self.steps if is_figure(row.get(name))]

    def figures(self, name: str) -> list[float]:
        return [figure for _, figure in self.series(name)]

    def recent(self, name: str) -> float | None:
        """Return the mean of a figure in the last WINDOW steps that have it, or None where none
        has."""
        figures = self.figures(name)[-WINDOW:]
        return fmean(figures) if figures else None


def is_figure(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_history(path: Path) -> History:
    """Read a run from its adapter directory, or another trainer's log.

    `path` is an adapter directory, a checkpoint, a folder of checkpoints, a `trainer_state.json`,
    or a JSON or JSONL file of TRL's `log_history`.

    Raises:
        FileNotFoundError: there is no such path, or it holds no log.
        ValueError: a file is damaged, or has no step of GRPO.
    """
    if (path / METRICS).is_file():
        settings, evaluation = (
            read_json(path / name) if (path / name).is_file() else {}
            for name in (TRAIN_CONFIG, EVAL)
        )
        rows = (read_jsonl(path / name) for name in (METRICS, VALIDATION, COMPLETIONS))
        steps, validations, completions = rows
        return History(steps, settings, validations, completions, evaluation)
    log = find_log(path)
    steps = [translate(row) for row in read_log(log) if {"step", "reward"} <= row.keys()]
    if not steps:
        raise ValueError(
            f"{log} has no step of GRPO, a row with step and reward: give an adapter directory, "
            f"a {TRAINER_STATE}, or TRL's log_history as JSON"
        )
    rates = [row["learning_rate"] for row in steps if is_figure(row.get("learning_rate"))]
    return History(name_shares(steps), {"learning_rate": max(rates)} if rates else {})


def find_log(path: Path) -> Path:
    """Return the file that holds TRL's log: the path itself, or the newest checkpoint's."""
    if path.is_file():
        return path
    checkpoints = sorted(path.glob("checkpoint-*"), key=number_of)
    for folder in (path, *reversed(checkpoints)):
        if (folder / TRAINER_STATE).is_file():
            return folder / TRAINER_STATE
    raise FileNotFoundError(
        f"{path} holds neither {METRICS} nor {TRAINER_STATE}: give an adapter directory or "
        "another trainer's output folder"
    )


def number_of(checkpoint: Path) -> int:
    digits = re.search(r"\d+$", checkpoint.name)
    return int(digits[0]) if digits else -1


def read_log(path: Path) -> list[Row]:
    """Return the rows of a trainer's state, of a list of rows, or of a file of one row per line."""
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        found = read_jsonl(path)
    rows = found.get("log_history", [found]) if isinstance(found, dict) else found
    return [row for row in rows if isinstance(row, dict)]


def translate(row: Row) -> Row:
    """Return a row of TRL's log under the names of `metrics.jsonl`."""
    parts = {
        name.split("/")[1]: row[name] for name in row if re.fullmatch(r"rewards/.+/mean", name)
    }
    renamed = {ours: row[theirs] for theirs, ours in TRL_NAMES.items() if theirs in row}
    if is_figure(row.get("reward_std")) and row["reward_std"] < SAME_REWARD:
        renamed["frac_reward_zero_std"] = 1.0
    return {**row, **renamed, "rewards": parts}


def name_shares(steps: list[Row]) -> list[Row]:
    """Add `correct` and `format` from the means of the reward functions that are named for them."""
    shares = {}
    for share, telling in TELLING.items():
        for name in steps[0]["rewards"]:
            found = [row["rewards"].get(name) for row in steps]
            if re.search(telling, name) and all(
                is_figure(part) and 0 <= part <= 1 for part in found
            ):
                shares[share] = name
    return [row | {share: row["rewards"][name] for share, name in shares.items()} for row in steps]
