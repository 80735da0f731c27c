"""The state of one training step: its completions, their rewards, and the time spent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from lora_grpo.tasks.task import NUMBER_TASK, Verdict

if TYPE_CHECKING:
    import torch


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def read_verdict(row: dict[str, Any]) -> Verdict:
    """Return the verdict in a row of `completions.jsonl`; older runs were of numbers, and recorded
    none."""
    if "correct" not in row:
        return NUMBER_TASK.judge(row["completion"], row["answer"])
    return Verdict(row["parsed"], row["correct"], row["format"])


def had_signal(row: dict[str, Any]) -> bool:
    """Return whether a step of `metrics.jsonl` had anything to learn from: a group with different
    rewards, and a gradient."""
    return row.get("frac_reward_zero_std") != 1 and row.get("grad_norm") != 0


@dataclass
class Batch:
    """The completions that the current updates learn from, and their rewards.

    The lists have B entries. `rewards` holds the weighted scores by reward, None where a reward did
    not apply; `verdicts` says how the task judged each completion. `normalised` is there where each
    reward is normalised in its group before they are added up: the sums. Completions that dynamic
    sampling replaced count as dropped.
    """

    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    normalised: list[float | None] | None = None
    dropped_completions: int = 0
    dropped_tokens: int = 0

    def totals(self) -> list[float | None]:
        """Return each completion's total reward, or None if no reward applied to it; such a
        completion is ignored, by TRL too."""
        return [
            None
            if all(score is None for score in scores)
            else sum(score or 0.0 for score in scores)
            for scores in zip(*self.rewards.values(), strict=True)
        ]

    def compared(self) -> list[float | None]:
        """Return what the advantages compare in a group: total rewards, or `normalised`."""
        return self.totals() if self.normalised is None else self.normalised

    def correct(self) -> float | None:
        """Return the share of completions with the right answer."""
        return mean(verdict.correct for verdict in self.verdicts)

    def formatted(self) -> float | None:
        """Return the share of completions in the requested format."""
        return mean(verdict.format for verdict in self.verdicts)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Return the rows of `completions.jsonl`, one per completion."""
        return [
            {
                "step": step,
                "question": self.questions[index],
                "answer": self.answers[index],
                "completion": self.completions[index],
                "parsed": self.verdicts[index].answer,
                "correct": self.verdicts[index].correct,
                "format": self.verdicts[index].format,
                "tokens": self.tokens[index],
                "truncated": self.truncated[index],
                "rewards": {name: scores[index] for name, scores in self.rewards.items()},
            }
            for index in range(len(self.completions))
        ]


@dataclass
class StepState:
    """The trainer's state in the current step.

    `batch` serves every update on the same completions. `inputs` is TRL's micro-batch while its
    loss is computed, and None otherwise; `part` is the part of a micro-batch in one backward pass,
    if the whole does not fit into memory. `entropy_weight` turns a micro-batch's mean entropy into
    its part of the step's mean. `seconds` and `tokens_computed` (the tokens that went through the
    model in the packed update) are of this step alone.
    """

    batch: Batch = field(default_factory=Batch)
    inputs: dict[str, Any] | None = None
    part: dict[str, Any] | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("generate", "sync", "reward", "update"), 0.0)
    )
    tokens_computed: int = 0
    entropy_weight: "torch.Tensor | float" = 1.0


def join_batches(batches: Sequence[Batch], kept: Sequence[int]) -> Batch:
    """Return the rows `kept` of the concatenated batches; the others count as dropped."""

    def pick(lists: Iterable[list[Any]]) -> list[Any]:
        rows = list(chain.from_iterable(lists))
        return [rows[index] for index in kept]

    lists = ("questions", "answers", "completions", "tokens", "truncated", "verdicts")
    columns = {name: pick(getattr(batch, name) for batch in batches) for name in lists}
    return Batch(
        **columns,
        rewards={
            name: pick(batch.rewards[name] for batch in batches) for name in batches[0].rewards
        },
        normalised=None
        if batches[0].normalised is None
        else pick(batch.normalised for batch in batches),
        dropped_completions=sum(len(batch.tokens) for batch in batches) - len(kept),
        dropped_tokens=sum(sum(batch.tokens) for batch in batches) - sum(columns["tokens"]),
    )
