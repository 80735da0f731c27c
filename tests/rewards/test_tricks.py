"""Each task is checked with answers by which it could be fooled, on the user's own problem."""

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.rewards.corpus import rank
from lora_grpo.rewards.tricks import make_tricks
from lora_grpo.tasks.kinds import TASKS
from lora_grpo.tasks.task import Task

PROBLEMS = {
    "choice": Problem(3, "Which is red?\n(A) grass (B) a rose (C) the sea", "B"),
    "text": Problem(3, "Who?", '["Ann Lee", "Lee"]'),
    "math": Problem(3, "What?", "x^2+1"),
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_trick_earns_what_a_right_answer_does(name: str, own: bool) -> None:
    task = TASKS[name]
    if name == "math":
        pytest.importorskip("math_verify")
    problem, tricks = make_tricks(task, PROBLEMS[name] if own else None)
    assert len(tricks.right) > 3 and len(tricks.wrong) > 5 and problem.row == (3 if own else 1)
    rewards = build_rewards(task=task)
    ranking = rank(rewards, "default", task=task, problem=problem)
    assert ranking.violations == [] and len(ranking.rules) == 2
    paid = {case.name: values["correctness"] for case, values in ranking.scores}
    assert {paid[trick] for trick in tricks.right} == {1.0}
    assert {paid[trick] for trick in tricks.wrong} == {0.0}


def test_a_task_that_is_fooled_is_reported() -> None:
    def inside(answer: str, gold: str, row: dict) -> bool:
        return gold in answer

    fooled = Task("text", "text", inside, bool, lambda text: text)
    found = rank(build_rewards(task=fooled), "default", task=fooled, problem=Problem(1, "q", "Ann"))
    broken = {line.split("'")[1] for line in found.violations}
    assert {"its negation", "two texts, or", "text in a sentence"} <= broken
