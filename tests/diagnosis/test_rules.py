"""Each fault is named by its own rule first; healthy runs and unknown figures raise nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.diagnosis.history import History
from lora_grpo.diagnosis.rules import RULES, diagnose
from lora_grpo.tasks.task import NUMBER_TASK

STEPS = 24
Row = dict[str, Any]


def healthy(step: int) -> Row:
    """A step of a run that learns: half right at first, four fifths at the end, with some noise."""
    done, wobble = step / STEPS, 0.02 * math.sin(7 * step)
    return {
        "step": step,
        "reward": 0.5 + 0.4 * done + wobble,
        "correct": 0.5 + 0.3 * done + wobble,
        "format": 0.6 + 0.35 * done,
        "completion_length": 120 + 30 * done + 5 * wobble,
        "clipped_ratio": 0.05,
        "frac_reward_zero_std": 0.3 + wobble,
        "loss": 0.01,
        "grad_norm": 0.2 + wobble,
        "learning_rate": 1e-5,
        "entropy": 0.4 - 0.1 * done,
        "kl": 0.01,
        "sampler_ratio": 1.001,
        "sampler_logprob_difference": 0.01,
        "seconds": 10.0,
        "seconds_generate": 6.0,
        "peak_memory_bytes": 5 * 10**9,
    }


SETTINGS = {"max_grad_norm": 1.0, "learning_rate": 1e-5, "max_completion_length": 256}
VALIDATIONS = [
    {"step": 8 * at, "strict_accuracy": 0.5 + 0.1 * at, "format_rate": 0.9, "num_items": 256}
    for at in (1, 2, 3)
]
EVALUATION = {
    "num_items": 512,
    "base": {"strict_accuracy": 0.5},
    "adapter": {"strict_accuracy": 0.7},
    "mcnemar_p": 1e-9,
}


def group(at: int, answers: list[str], gold: str = "12", **rewards: list[float]) -> list[Row]:
    rewards = rewards or {"correctness": [float(answer == gold) for answer in answers]}
    return [
        {
            "step": STEPS,
            "question": f"question {at}",
            "answer": gold,
            "completion": NUMBER_TASK.write("so", answer),
            "rewards": {name: scores[row] for name, scores in rewards.items()},
        }
        for row, answer in enumerate(answers)
    ]


GOOD_GROUPS = [row for at in range(10) for row in group(at, ["12", "12", "12", "11"])]


def build(
    change: Callable[[int], Row] = lambda step: {},
    settings: Row | None = None,
    validations: list[Row] = VALIDATIONS,
    completions: list[Row] = GOOD_GROUPS,
    evaluation: Row = EVALUATION,
) -> History:
    steps = [healthy(step) | change(step) for step in range(1, STEPS + 1)]
    return History(steps, SETTINGS | (settings or {}), validations, completions, evaluation)


def test_a_healthy_run_raises_nothing() -> None:
    assert diagnose(build()) == []


DEAD = {"frac_reward_zero_std": 1.0, "grad_norm": 0.0, "loss": 0.0, "entropy": None}
PAID = {"correctness": 0.0, "format": 0.2}
FALLING = [VALIDATIONS[2] | {"step": 8}, VALIDATIONS[0] | {"step": 16, "strict_accuracy": 0.6}]
LOUD = [
    row
    for at in range(10)
    for row in group(
        at, ["12", "11", "12", "11"], correctness=[1.0, 0.0, 1.0, 0.0], loud=[60.0, 0.0, 30.0, 9.0]
    )
]
FAULTS: dict[str, History] = {
    "no_reward": build(lambda step: DEAD | {"reward": None}),
    "not_finite": build(lambda step: {"loss": math.nan} if step > 20 else {}),
    "truncated": build(lambda step: {"clipped_ratio": 0.7 if step > 10 else 0.1}),
    "no_format": build(lambda step: {"format": 0.0, "correct": 0.0}),
    "constant_reward": build(lambda step: DEAD | {"reward": 1.0}),
    "too_hard": build(lambda step: DEAD | {"correct": 0.01, "reward": 0.2, "rewards": PAID}),
    "too_easy": build(lambda step: DEAD | {"correct": 0.99, "reward": 1.2, "rewards": PAID}),
    "few_live_groups": build(lambda step: DEAD | {"correct": 0.6}),
    "wrong_gold": build(
        lambda step: {"correct": 0.01},
        completions=[row for at in range(10) for row in group(at, ["7", "7", "7", "8"])],
    ),
    "reward_hacking": build(lambda step: {"correct": 0.7 - 0.02 * step}),
    "drowned_reward": build(completions=LOUD),
    "length_runaway": build(lambda step: {"completion_length": 50.0 + 10 * step, "correct": 0.5}),
    "length_collapse": build(lambda step: {"completion_length": 200.0 - 8 * step, "correct": 0.5}),
    "learning_rate_high": build(
        lambda step: (
            {"correct": 0.6, "reward": 0.6} if step < 9 else {"correct": 0.02, "reward": 0.1}
        )
    ),
    "entropy_collapse": build(lambda step: {"entropy": 0.4 if step < 9 else 0.001}),
    "gradient_zero": build(lambda step: {"grad_norm": 0.0}),
    "gradient_clipped": build(lambda step: {"grad_norm": 40.0}),
    "kl_high": build(lambda step: {"kl": 0.2 * step}),
    "sampler_differs": build(lambda step: {"sampler_logprob_difference": 0.3}),
    "learning_rate_low": build(validations=[row | {"strict_accuracy": 0.5} for row in VALIDATIONS]),
    "validation_falls": build(lambda step: {"reward": 0.5}, validations=FALLING),
    "within_noise": build(evaluation=EVALUATION | {"mcnemar_p": 0.4}),
    "slow_generation": build(lambda step: {"seconds_generate": 9.0}),
    "memory_creeps": build(lambda step: {"peak_memory_bytes": (4 + step // 4) * 10**9}),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_fault_is_named_first_by_its_own_rule(rule) -> None:
    found = diagnose(FAULTS[rule.__name__])
    assert found[0].rule == rule.__name__
    assert "--" in str(found[0]) or rule.__name__ in ("reward_hacking", "length_collapse")


def test_a_reward_that_fell_with_the_right_answers_is_not_hacked() -> None:
    """As in a real run of few prompts per step: 22 %, then 74 %, then hard prompts with 45 %."""
    shares = [0.22] * 8 + [0.74] * 9 + [0.45] * 8
    run = build(lambda step: {"correct": shares[step - 1], "reward": shares[step - 1] + 0.2})
    assert "reward_hacking" not in [found.rule for found in diagnose(run)]


def test_every_rule_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/diagnosis.md").read_text()
    assert all(f"`{rule.__name__}`" in page for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_fault_that_is_over_is_not_named(rule) -> None:
    """What a run went through in its first half and left behind."""
    if rule.__name__ in ("reward_hacking", "memory_creeps", "length_runaway", "length_collapse"):
        pytest.skip("it compares the end with the start, so that it is never over in a later step")
    broken = FAULTS[rule.__name__].steps[: STEPS // 2]
    later = [healthy(STEPS) | {"step": step} for step in range(STEPS // 2 + 1, 2 * STEPS)]
    assert rule(build() if not broken else History([*broken, *later], SETTINGS)) is None


def test_since_is_the_step_in_which_it_began() -> None:
    assert diagnose(FAULTS["truncated"])[0].since in (8, 9, 10, 11)
    assert diagnose(FAULTS["constant_reward"])[0].since == 1
    assert diagnose(FAULTS["no_reward"])[0].since == 1


def test_advice_holds_the_value_to_change_to() -> None:
    assert "--max-completion-length to 512 (now 256)" in str(diagnose(FAULTS["truncated"])[0])
    other_trainers = History(FAULTS["truncated"].steps)
    assert "aise --max-completion-length" in str(diagnose(other_trainers)[0])


@pytest.mark.parametrize("name", [name for name in healthy(1) if name != "step"])
@pytest.mark.parametrize("missing", ["absent", None, math.nan])
def test_a_figure_may_be_missing(name: str, missing: Any) -> None:
    """In a healthy run nothing is named for it, except a loss or a reward without a value."""
    steps = [
        {key: value for key, value in healthy(step).items() if key != name}
        | ({} if missing == "absent" else {name: missing})
        for step in range(1, STEPS + 1)
    ]
    allowed = {"loss": {"not_finite"}, "grad_norm": {"not_finite"}, "reward": {"no_reward"}}
    found = {finding.rule for finding in diagnose(History(steps, SETTINGS))}
    assert found <= allowed.get(name, set())


@pytest.mark.parametrize("count", range(12))
def test_a_run_that_has_just_begun_raises_nothing(count: int) -> None:
    assert diagnose(History(build().steps[:count], SETTINGS)) == []
