"""Completions become figures: accuracy on held-out items, its uncertainty, and the paired test of
two models.

The parser that pays the reward is the one that counts here.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from lora_grpo.data.problems import Problem
from lora_grpo.policy.generate import Completion
from lora_grpo.tasks.task import NUMBER_TASK, Task

# What `eval.json` calls the model that GRPO started from if not from a fresh adapter, in words.
STARTS = {"sft": "after warm-up", "start": "given adapter"}
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Item:
    """How one completion did on one problem."""

    completion: str
    strict: bool
    lenient: bool
    format: bool
    truncated: bool
    tokens: int


def judge(problem: Problem, completion: Completion, task: Task = NUMBER_TASK) -> Item:
    """Score one completion: strict reads the answer tags, lenient the last one anywhere."""
    asked = (completion.text, problem.answer, problem.as_row())
    return Item(
        completion=completion.text,
        strict=task.is_right(*asked),
        lenient=task.is_right_anywhere(*asked),
        format=task.has_format(completion.text),
        truncated=completion.truncated,
        tokens=completion.tokens,
    )


def wilson_interval(successes: float, total: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    share, z = successes / total, Z95
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean_interval(values: Sequence[float], samples: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of one value in [0, 1] per problem, each estimated from
    this many samples.

    It is Wilson's with the effective number of problems, that of yes-or-no problems whose mean
    would vary as this one does (Korn and Graubard 1998): for values of 0 and 1 it is Wilson's own.
    """
    total, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / total
    most, effective = float(total * samples), float(total)
    if 0 < mean < 1:
        effective = min(most, total * mean * (1 - mean) / variance) if variance else most
    return wilson_interval(mean * effective, effective)


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the two-sided exact McNemar p-value: only items on which the two differ count."""
    gained = sum(after and not before for before, after in zip(first, second, strict=True))
    lost = sum(before and not after for before, after in zip(first, second, strict=True))
    tail = sum(math.comb(gained + lost, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def summarise(items: Sequence[Item]) -> dict[str, Any]:
    """Return a model's figures as `eval.json` names them."""

    def share(name: str) -> float:
        return sum(getattr(item, name) for item in items) / len(items)

    return {
        "strict_accuracy": share("strict"),
        "lenient_accuracy": share("lenient"),
        "format_rate": share("format"),
        "truncated_rate": share("truncated"),
        "mean_completion_tokens": share("tokens"),
        "ci95": list(wilson_interval(sum(item.strict for item in items), len(items))),
    }


def build_evaluation(dataset: str, split: str, models: dict[str, Sequence[Item]]) -> dict[str, Any]:
    """Return `eval.json`: a summary for each model, `base` and `adapter`, and the paired test where
    both are there."""
    found: dict[str, Any] = {
        "dataset": dataset,
        "split": split,
        "num_items": len(next(iter(models.values()))),
        **{name: summarise(items) for name, items in models.items()},
    }
    if {"base", "adapter"} <= models.keys():
        strict = [[item.strict for item in models[name]] for name in ("base", "adapter")]
        found["mcnemar_p"] = mcnemar_p(*strict)
    for name in STARTS.keys() & models.keys():  # what GRPO itself added
        found[f"mcnemar_p_{name}"] = mcnemar_p(
            *([item.strict for item in models[part]] for part in (name, "adapter"))
        )
    return found


def list_models(report: dict[str, Any]) -> dict[str, str]:
    """Return the models of an `eval.json` in the order of training, each with its name in words."""
    names = {"base": "base", **STARTS, "adapter": "adapter"}
    return {name: words for name, words in names.items() if name in report}


def find_start(report: dict[str, Any]) -> str:
    """Return what an `eval.json` calls the model that GRPO started from."""
    return next((name for name in STARTS if name in report), "base")


def build_eval_items(
    problems: Sequence[Problem], models: dict[str, Sequence[Item]], task: Task = NUMBER_TASK
) -> list[dict[str, Any]]:
    """Return `eval_items.jsonl`: one row per problem, with each model's item under its name, and
    with the problem's columns where the task judges by them."""
    return [
        {
            "index": index,
            "question": problem.question,
            "answer": problem.answer,
            **({"columns": keep_json(problem.columns)} if task.needs_row else {}),
            **{name: asdict(items[index]) for name, items in models.items()},
        }
        for index, problem in enumerate(problems)
    ]


def keep_json(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that JSON can hold."""
    kept = {}
    for name, value in columns.items():
        with suppress(TypeError, ValueError):
            kept[name] = json.loads(json.dumps(value))
    return kept


def read_item(row: dict[str, Any]) -> Problem:
    """Return the problem of a row of `eval_items.jsonl`."""
    columns = row.get("columns", {})
    return Problem(row["index"] + 1, row["question"], row["answer"], columns=columns)
