"""Completions that a reward could not score are left out of their group, and which call ended first
changes nothing."""

import random
import time
from pathlib import Path

import pytest
import torch
from trainers import make_trainer

from lora_grpo.rewards.builtin import Reward, build_rewards
from lora_grpo.rewards.calls import Calls, NotScored, OwnReward, RewardError
from lora_grpo.train.recorder import describe_step


def judge(function, workers: int | None) -> list[Reward]:
    """The format reward, of the default set, and the user's own."""
    own = Reward("judge", OwnReward("judge", function, Calls(workers)), 0.5, "hash")
    return [build_rewards()[1], own]


def by_length(completions, **columns):
    time.sleep(random.random() / 100)
    return [len(text) / 100 for text in completions]


def unless_even(completions, **columns):
    if len(completions[0]) % 2 == 0:
        raise NotScored("even")
    return by_length(completions)


def test_what_is_not_scored_gets_no_advantage_and_changes_no_mean(tmp_path: Path) -> None:
    said: list[str] = []
    trainer = make_trainer(tmp_path, say=said.append, rewards=judge(unless_even, 4))
    trainer.model.train()
    batch = list(trainer.train_dataset)[:4]
    output = trainer._generate_and_score_completions([row for row in batch for _ in range(4)])
    drawn, totals = (
        trainer.step.batch,
        torch.tensor(
            [float("nan") if total is None else total for total in trainer.step.batch.totals()]
        ),
    )
    scored = torch.tensor([len(text) % 2 == 1 for text in drawn.completions])
    assert torch.equal(~totals.isnan(), scored) and 0 < scored.sum() < 16
    for start in range(0, 16, 4):
        group, known = slice(start, start + 4), scored[start : start + 4]
        advantages = output["advantages"][group]
        assert not advantages[~known].any()
        rewards = totals[group][known]
        if len(rewards) > 1:
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            assert advantages[known].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    missing = 16 - int(scored.sum())
    assert said[-1] == (
        f"step 1: reward 'judge' did not score {missing} of 16 completions, which are left out of "
        "the step: even"
    )
    assert describe_step(drawn, 4, {})["unscored_ratio"] == missing / 16


def test_a_step_without_any_score_stops_the_run(tmp_path: Path) -> None:
    def down(completions, **columns):
        raise NotScored("the judge is down")

    trainer = make_trainer(tmp_path, rewards=judge(down, 4))
    with pytest.raises(RewardError, match=r"did not score 16 of 16 .*the judge is down"):
        trainer.train()


def test_workers_change_no_weight(tmp_path: Path) -> None:
    trained = []
    for workers in (None, 5):
        trainer = make_trainer(tmp_path, rewards=judge(by_length, workers))
        trainer.train()
        trained.append([parameter.clone() for parameter in trainer.trained])
    for other in trained[1:]:
        assert all(map(torch.equal, trained[0], other))
    assert any(parameter.any() for parameter in trained[0])
