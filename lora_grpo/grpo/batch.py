"""The completions of one step and what they earned, as the trainer shows them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lora_grpo.data.task import NUMBER_TASK


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are known, or None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def had_signal(row: dict[str, Any]) -> bool:
    """Return whether a step of `metrics.jsonl` had anything to learn from: a group whose rewards
    differ, in completions that count."""
    return row.get("frac_reward_zero_std") != 1 and row.get("grad_norm") != 0


@dataclass
class Batch:
    """The completions that the current updates learn from, and what they earned.

    The lists have B entries; `rewards` holds weighted scores by the reward's name, None where it
    did not apply. What was sampled for the batch and is not in it is counted as dropped.
    """

    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    dropped_completions: int = 0
    dropped_tokens: int = 0

    def totals(self) -> list[float | None]:
        """Return each completion's summed reward, None where no reward applied to it: such a
        completion counts nowhere, in TRL too."""
        return [
            None
            if all(score is None for score in scores)
            else sum(score or 0.0 for score in scores)
            for scores in zip(*self.rewards.values(), strict=True)
        ]

    def correct(self) -> float | None:
        """Return the share of completions whose tagged answer is the gold one."""
        return mean(map(NUMBER_TASK.is_right, self.completions, self.answers))

    def formatted(self) -> float | None:
        """Return the share of completions in the format asked for."""
        return mean(map(NUMBER_TASK.has_format, self.completions))

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Return what `completions.jsonl` records, a row a completion."""
        return [
            {
                "step": step,
                "question": self.questions[index],
                "answer": self.answers[index],
                "completion": self.completions[index],
                "tokens": self.tokens[index],
                "truncated": self.truncated[index],
                "rewards": {name: scores[index] for name, scores in self.rewards.items()},
            }
            for index in range(len(self.completions))
        ]


def join_batches(batches: Sequence[Batch], kept: Sequence[int]) -> Batch:
    """Return the rows `kept` of batches laid one after another; the others count as dropped."""

    def pick(lists: list[list[Any]]) -> list[Any]:
        rows = list(chain(*lists))
        return [rows[index] for index in kept]

    joined = Batch(
        questions=pick([batch.questions for batch in batches]),
        answers=pick([batch.answers for batch in batches]),
        completions=pick([batch.completions for batch in batches]),
        tokens=pick([batch.tokens for batch in batches]),
        truncated=pick([batch.truncated for batch in batches]),
        rewards={
            name: pick([batch.rewards[name] for batch in batches]) for name in batches[0].rewards
        },
    )
    joined.dropped_completions = sum(len(batch.tokens) for batch in batches) - len(kept)
    joined.dropped_tokens = sum(sum(batch.tokens) for batch in batches) - sum(joined.tokens)
    return joined
