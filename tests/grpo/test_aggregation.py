"""Rewards that are normalised each, then added up (GDPO): TRL's advantages, dead groups, draws."""

from pathlib import Path

import pytest
import torch
from trainers import make_trainer

from lora_grpo.data.problems import load_problems
from lora_grpo.data.prompt import PLAIN
from lora_grpo.grpo.groups import (
    Replacements,
    dead_groups,
    normalise_in_batch,
    normalise_in_groups,
)
from lora_grpo.grpo.settings import dataset_rows
from lora_grpo.rewards.builtin import Reward
from lora_grpo.train.recorder import describe_step

G = 4
NAN = float("nan")
ROWS = dataset_rows(load_problems("arithmetic")[:64], PLAIN)
KNOBS = {
    "multi_objective_aggregation": "normalize_then_sum",
    "max_completion_length": 8,
    "max_steps": 2,
}


@pytest.mark.parametrize(
    ("scores", "weights", "dead"),
    [
        ([[0, 0.5], [1, 0], [0, 0.5], [1, 0]], (1, 2), False),  # though the totals are equal
        ([[0, 1], [1, 0], [0, 1], [1, 0]], (1, 1), True),  # though the rewards differ
        ([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7], [0.1, 0.7]], (1, 1), True),
        ([[0.1, NAN], [0.1, 0.7], [NAN, NAN], [0.1, NAN]], (1, 1), True),
        ([[0, NAN], [1, NAN], [NAN, NAN], [0, 3]], (1, 1), False),
    ],
)
def test_a_group_is_dead_if_no_completion_has_an_advantage(
    scores: list, weights: tuple, dead: bool
) -> None:
    sums = normalise_in_groups(torch.tensor(scores), torch.tensor(weights), G)
    assert dead_groups(sums, G) == [dead]
    unpaid = [all(value != value for value in row) for row in scores]
    assert [value is None for value in sums] == unpaid


def rewards() -> list[Reward]:
    """Two rewards of which one is None at times, and both equal where the answer is even."""

    def place(completions: list, answer: list[str], **_) -> list[float]:
        return [0.3 if int(gold) % 2 == 0 else float(row % G) for row, gold in enumerate(answer)]

    def other(completions: list, answer: list[str], **_) -> list[float | None]:
        scores = [0.7 if int(gold) % 2 == 0 else row % 3 / 10 for row, gold in enumerate(answer)]
        return [None if row % 5 == 4 else score for row, score in enumerate(scores)]

    return [Reward("place", place), Reward("other", other, weight=0.5)]


def learnt(trainer) -> torch.Tensor:
    return torch.cat([inputs["advantages"] for inputs in trainer._buffered_inputs]).sort().values


def test_advantages_are_trls_and_dead_groups_are_counted_and_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rewards=rewards(), **KNOBS)
    trainer.train()
    batch = trainer.step.batch
    dead = [int(answer) % 2 == 0 for answer in batch.answers[::G]]
    assert set(dead) == {True, False}
    assert describe_step(batch, G, {})["frac_reward_zero_std"] == sum(dead) / len(dead)
    assert (learnt(trainer) == 0).sum() == G * sum(dead)
    expected = normalise_in_batch(batch.normalised).sort().values
    torch.testing.assert_close(learnt(trainer), expected, rtol=1e-4, atol=1e-3)


def test_replaced_groups_are_normalised_over_the_batch_that_is_learnt_from(tmp_path: Path) -> None:
    replacements = Replacements(ROWS, rounds=20, seed=0)
    trainer = make_trainer(tmp_path, rewards=rewards(), replacements=replacements, **KNOBS)
    trainer.train()
    batch = trainer.step.batch
    assert batch.dropped_completions and not any(dead_groups(batch.compared(), G))
    sums = torch.zeros(len(batch.tokens))
    for name, weight in (("place", 1.0), ("other", 0.5)):
        scores = torch.tensor([NAN if x is None else x / weight for x in batch.rewards[name]])
        for group, target in zip(scores.view(-1, G), sums.view(-1, G), strict=True):
            known = group[~group.isnan()]
            target += (weight * (group - known.mean()) / (known.std() + 1e-4)).nan_to_num(0)
    expected = ((sums - sums.mean()) / (sums.std() + 1e-4)).sort().values
    torch.testing.assert_close(learnt(trainer), expected, rtol=1e-4, atol=1e-5)
