"""What one step of training holds: its completions, what they earned, and what it has spent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lora_grpo.data.task import NUMBER_TASK


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def had_signal(row: dict[str, Any]) -> bool:
    """Return whether a step of `metrics.jsonl` had anything to learn from: a group with different
    rewards, in completions that count."""
    return row.get("frac_reward_zero_std") != 1 and row.get("grad_norm") != 0


@dataclass
class Batch:
    """The completions that the current updates learn from, and what they earned.

    The lists have B entries. `rewards` holds weighted scores under each reward's name, None where
    it did not apply. Completions that dynamic sampling replaced count as dropped.
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
        """Return each completion's summed reward, or None if no reward applied to it; such a
        completion is ignored everywhere, by TRL too."""
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
        """Return the share of completions in the requested format."""
        return mean(map(NUMBER_TASK.has_format, self.completions))

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Return the rows of `completions.jsonl`, one per completion."""
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


@dataclass
class StepState:
    """What the trainer holds of the current step.

    `batch` serves every update on the same completions. `inputs` is TRL's micro-batch while its
    loss is computed, and None otherwise; `part` is the piece of a micro-batch that a backward pass
    is given where the whole does not fit into memory. `seconds` and `tokens_computed` (tokens that
    went through the model in the packed update) start anew with each step.
    """

    batch: Batch = field(default_factory=Batch)
    inputs: dict[str, Any] | None = None
    part: dict[str, Any] | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("generate", "sync", "reward", "update"), 0.0)
    )
    tokens_computed: int = 0


def join_batches(batches: Sequence[Batch], kept: Sequence[int]) -> Batch:
    """Return the rows `kept` of the concatenated batches; the others count as dropped."""

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
