"""A run's records as one object for report.html, thinned to a number of bytes.

An adapter directory goes in, also of a run that has not ended; no weights are loaded. What is left
out is said in the object's `notes`.
"""

import json
import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lora_grpo.grpo.batch import read_verdict
from lora_grpo.machine.files import read_jsonl
from lora_grpo.policy.adapter import (
    COMPLETIONS,
    EVAL,
    EVAL_ITEMS,
    METRICS,
    TRAIN_CONFIG,
    VALIDATION,
    WEIGHTS,
    read_step,
)
from lora_grpo.results.card import list_settings
from lora_grpo.results.records import read_if_there, short_name

Row = dict[str, Any]

# Of a run's bytes; the rest is for its curves and settings.
SHARE_OF_GROUPS, SHARE_OF_ITEMS = 0.5, 0.35
GROUPS = "groups of completions are shown: older steps are thinned"
ITEMS = "test problems are shown: those that changed, then others"
MOST_POINTS = 1000  # of a curve, over all runs of a page
WHOLE, LONG, SHORT = 2**20, 2**14, 2**8  # characters of a text that are kept, if they fit
CHANGES = ("gained", "lost", "both wrong", "both right")
USED = ("max_completion_length", "max_grad_norm", "system_prompt", "example")


def gather_run(run_dir: Path, budget: int, runs: int = 1) -> Row:
    """Return what the page shows of a run, in about `budget` bytes; it is one of `runs`."""
    trained = read_if_there(run_dir / TRAIN_CONFIG)
    metrics, validation = read_jsonl(run_dir / METRICS), read_jsonl(run_dir / VALIDATION)
    evaluation = read_if_there(run_dir / EVAL)
    notes: list[str] = []
    groups = read_groups(read_jsonl(run_dir / COMPLETIONS), trained)
    items = order_items(read_jsonl(run_dir / EVAL_ITEMS))
    last = metrics[-1] if metrics else {}
    return {
        "name": run_dir.resolve().name,
        "settings": {
            **{name: short_name(trained.get(name, "-")) for name in ("model", "dataset")},
            **list_settings(trained),
        },
        "used": {name: trained.get(name) for name in USED},
        "evaluation": evaluation,
        "kept_step": evaluation.get("best_step", find_kept(run_dir)),
        "step": last.get("step", 0),
        "steps": trained.get("steps"),
        "minutes": sum(row.get("seconds") or 0 for row in metrics) / 60,
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        "predicted_memory_bytes": last.get("predicted_memory_bytes"),
        "metrics": columns(metrics, MOST_POINTS // runs, notes),
        "validation": columns(validation, MOST_POINTS // runs, notes),
        "groups": fit(groups, SHARE_OF_GROUPS * budget, drop_older, GROUPS, notes),
        "items": fit(items, SHARE_OF_ITEMS * budget, drop_last, ITEMS, notes),
        "notes": notes,
    }


def find_kept(run_dir: Path) -> int | None:
    """Return the step whose adapter is in the directory so far."""
    return read_step(run_dir / WEIGHTS) if (run_dir / WEIGHTS).is_file() else None


def columns(rows: list[Row], most: int, notes: list[str]) -> dict[str, list[Any]]:
    """Return rows as a list of values per name, rewards under `rewards/NAME`, and every n-th row
    where there are more than `most`; the last one is always there."""
    every = -(-len(rows) // max(1, most))
    if every > 1:
        rows = rows[(len(rows) - 1) % every :: every]
        notes.append(f"the curves show one of {every} steps")
    flat = [
        {**row, **{f"rewards/{name}": score for name, score in row.get("rewards", {}).items()}}
        for row in rows
    ]
    names = dict.fromkeys(name for row in flat for name in row if name != "rewards")
    return {name: [shorten(row.get(name)) for row in flat] for name in names}


def shorten(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_groups(rows: list[Row], trained: Row) -> list[Row]:
    """Return the groups of each logged step: G completions of one prompt, with their advantages."""
    size = trained.get("num_generations", 1)
    groups = []
    for step, of_step in groupby(rows, key=lambda row: row["step"]):
        whole = list(of_step)
        whole = whole[: len(whole) // size * size]  # the last step may be half written
        totals = [total(row["rewards"]) for row in whole]
        earned = advantages(totals, size, trained.get("scale_rewards", "group")).flatten()
        for start in range(0, len(whole), size):
            members = range(start, start + size)
            groups.append(
                {
                    "step": step,
                    "question": whole[start]["question"],
                    "answer": whole[start]["answer"],
                    "completions": [
                        describe_completion(whole[at], totals[at], earned[at]) for at in members
                    ],
                }
            )
    return groups


def describe_completion(row: Row, reward: float | None, advantage: float) -> Row:
    """Return a completion as the page shows it, judged by the task that paid it."""
    verdict = read_verdict(row)
    return {
        "text": row["completion"],
        "right": verdict.correct,
        "format": verdict.format,
        "truncated": row["truncated"],
        "tokens": row["tokens"],
        "reward": shorten(reward),
        "rewards": {name: shorten(score) for name, score in row["rewards"].items()},
        "advantage": shorten(float(advantage)),
    }


def total(rewards: dict[str, float | None]) -> float | None:
    known = [score for score in rewards.values() if score is not None]
    return sum(known) if known else None


def advantages(
    rewards: list[float | None], num_generations: int, scale_rewards: str
) -> np.ndarray:  # (P, G)
    """Return each reward less its group's mean, divided as TRL does by the standard deviation of
    the group or the batch; 0 where no reward applied."""
    grouped = np.array(rewards, dtype=float).reshape(-1, num_generations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any reward
        found = grouped - np.nanmean(grouped, axis=1, keepdims=True)
        if scale_rewards != "none":
            axis = 1 if scale_rewards == "group" else None
            found /= np.nanstd(grouped, axis=axis, ddof=1, keepdims=True) + 1e-4
    return np.nan_to_num(found, posinf=0.0, neginf=0.0)


def order_items(items: list[Row]) -> list[Row]:
    """Return the test problems that both models answered, those whose answer changed first."""

    def change(item: Row) -> str:
        before, after = item["base"]["strict"], item["adapter"]["strict"]
        if before == after:
            return "both right" if after else "both wrong"
        return "gained" if after else "lost"

    compared = [
        {**item, "change": change(item)} for item in items if {"base", "adapter"} <= item.keys()
    ]
    return sorted(compared, key=lambda item: CHANGES.index(item["change"]))


def encode(value: Any) -> str:
    """Return JSON in ASCII that is inert inside a <script> element; NaN and infinities are null."""
    return escape(json.loads(json.dumps(value), parse_constant=lambda name: None))


def escape(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fit(
    entries: list[Row],
    budget: float,
    fewer: Callable[[list[Row]], list[Row]],
    what: str,
    notes: list[str],
) -> list[Row]:
    """Return entries whose JSON has at most `budget` bytes: long texts are cut first, then entries
    are left out by `fewer`; what was done goes to the notes."""
    limit, left = WHOLE, entries
    shown = cut(left, limit)
    while shown and len(escape(shown)) > budget:
        if limit > LONG or (limit > SHORT and len(left) <= 2):
            limit //= 2
        else:
            left = fewer(left)
        shown = cut(left, limit)
    if len(left) < len(entries):
        notes.append(f"{len(left):,} of {len(entries):,} {what}")
    if shown != left:
        notes.append(f"texts of more than {limit:,} characters are cut in {what.split(' are')[0]}")
    return shown


def cut(value: Any, limit: int) -> Any:
    """Return a value with each string in it cut to `limit` characters."""
    if isinstance(value, dict):
        return {name: cut(part, limit) for name, part in value.items()}
    if isinstance(value, list):
        return [cut(part, limit) for part in value]
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]} … [{len(value) - limit:,} more characters]"
    return value


def drop_older(groups: list[Row]) -> list[Row]:
    """Return the groups without every second step of the older half, or every second group."""
    steps = sorted({group["step"] for group in groups})
    dropped = steps[: len(steps) // 2][1::2]
    if not dropped:  # three steps or fewer are left
        return groups[1::2]
    return [group for group in groups if group["step"] not in dropped]


def drop_last(items: list[Row]) -> list[Row]:
    return items[: len(items) * 9 // 10]
