"""Several sampled completions per problem become pass@k and maj@K, each with its interval.

pass@k is the chance that at least one of k completions is right; maj@K counts the answer that most
of the K completions give. Of equally frequent answers the one that was sampled first counts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_grpo.data.problems import Problem
from lora_grpo.policy.drawing import Sampling
from lora_grpo.results.scoring import Item, mcnemar_p, mean_interval
from lora_grpo.tasks.task import NO_ROW, NUMBER_TASK, Row, Task


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `num_right` of `num_samples` completions: the
    share of the choices of k of them that hold a right one (Chen et al. 2021, arXiv 2107.03374).
    """
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def reported_ks(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to the number of samples, which is the last."""
    return [*(2**power for power in range((num_samples - 1).bit_length())), num_samples]


def majority(completions: Sequence[str], task: Task = NUMBER_TASK, row: Row = NO_ROW) -> str | None:
    """Return the answer that most completions give between the tags, as the first of them wrote it;
    None if none can be read.

    Answers that are equal to the task are one, and those it cannot read do not count. Of equally
    frequent answers the one that was given first wins.
    """
    answers = [task.parse(completion) for completion in completions]
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None and task.can_read(answer):
            known = next((other for other in votes if task.same(answer, other, row)), answer)
            votes[known] = votes.get(known, 0) + 1
    return max(votes, key=votes.__getitem__, default=None)


def votes_right(problem: Problem, samples: Sequence[Item], task: Task = NUMBER_TASK) -> bool:
    """Return whether the majority's answer is the gold one."""
    row = problem.as_row()
    chosen = majority([item.completion for item in samples], task, row)
    return chosen is not None and task.same(chosen, problem.answer, row)


def summarise_samples(
    problems: Sequence[Problem], samples: Sequence[Sequence[Item]], task: Task = NUMBER_TASK
) -> dict[str, Any]:
    """Return a model's sampled figures as `eval.json` names them."""
    num_samples, right = len(samples[0]), [sum(item.strict for item in row) for row in samples]
    figures = {
        f"pass@{k}": [pass_at_k(num_samples, count, k) for count in right]
        for k in reported_ks(num_samples)
    }
    pairs = zip(problems, samples, strict=True)
    figures[f"maj@{num_samples}"] = [float(votes_right(*pair, task)) for pair in pairs]
    return {
        **{name: sum(values) / len(values) for name, values in figures.items()},
        "ci95": {
            name: list(mean_interval(values, num_samples)) for name, values in figures.items()
        },
    }


def build_sampled(
    problems: Sequence[Problem],
    models: dict[str, Sequence[Sequence[Item]]],
    sampling: Sampling,
    task: Task = NUMBER_TASK,
) -> dict[str, Any]:
    """Return the `sampled` part of `eval.json`: how the completions were sampled, a summary for
    each model, and the paired test of the majorities where base and adapter are there."""
    found = asdict(sampling) | {
        name: summarise_samples(problems, samples, task) for name, samples in models.items()
    }
    if {"base", "adapter"} <= models.keys():
        right = [
            [votes_right(*pair, task) for pair in zip(problems, models[name], strict=True)]
            for name in ("base", "adapter")
        ]
        found["mcnemar_p"] = mcnemar_p(*right)
    return found


def build_sampled_items(
    problems: Sequence[Problem],
    models: dict[str, Sequence[Sequence[Item]]],
    task: Task = NUMBER_TASK,
) -> list[dict[str, Any]]:
    """Return the rows of the samples' file, one per problem, with each model's majority answer and
    its completions under its name."""

    def describe(samples: Sequence[Item]) -> dict[str, Any]:
        chosen = majority([item.completion for item in samples], task)
        return {"majority": chosen, "samples": [asdict(item) for item in samples]}

    return [
        {
            "index": index,
            "question": problem.question,
            "answer": problem.answer,
            **{name: describe(samples[index]) for name, samples in models.items()},
        }
        for index, problem in enumerate(problems)
    ]
