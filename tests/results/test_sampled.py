"""pass@k equals the enumeration of all choices; the vote and the intervals follow their rules."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.generate import Completion
from lora_grpo.results.evaluate import EvaluateConfig, evaluate
from lora_grpo.results.sampled import (
    build_sampled,
    build_sampled_items,
    majority,
    pass_at_k,
    reported_ks,
)
from lora_grpo.results.scoring import Item, judge, mcnemar_p, mean_interval, wilson_interval
from lora_grpo.train.console import Display

SAMPLING = Sampling(4, 1.0, 0)
PROBLEMS = [Problem(1, "q0", "72"), Problem(2, "q1", "5"), Problem(3, "q2", "6")]


def answered(*answers: str | None) -> list[str]:
    return ["no tags" if each is None else f"<answer>{each}</answer>" for each in answers]


def sampled(*rows: tuple[str | None, ...]) -> list[list[Item]]:
    return [
        [judge(problem, Completion(text, 9, False)) for text in answered(*row)]
        for problem, row in zip(PROBLEMS, rows, strict=True)
    ]


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(num_samples: int) -> None:
    for num_right, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        right = [index < num_right for index in range(num_samples)]
        choices = [any(choice) for choice in itertools.combinations(right, k)]
        expected = sum(choices) / len(choices)
        assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact() -> None:
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 9_999, 1) == pytest.approx(0.9999, abs=1e-12)


@pytest.mark.parametrize(
    ("num_samples", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_the_ks_double_up_to_the_number_of_samples(num_samples: int, ks: list[int]) -> None:
    assert reported_ks(num_samples) == ks


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (("5", "72", "72.0", "9"), "72"),  # equal numbers are one answer
        (("5", "72", "72", "5"), "5"),  # a tie: the first one given
        (("72", "5", "5", "72"), "72"),
        ((None, None, None, "72"), "72"),  # a completion without an answer does not vote
        (("many", "many", "72", None), "72"),  # nor one that cannot be read
        ((None, "many", None, None), None),
    ],
)
def test_the_majority_s_answer(answers: tuple[str | None, ...], chosen: str | None) -> None:
    assert majority(answered(*answers)) == chosen


def test_the_interval_of_zeros_and_ones_is_wilson_s() -> None:
    for right in (0, 3, 20):
        values = [1.0] * right + [0.0] * (20 - right)
        assert mean_interval(values, 8) == pytest.approx(wilson_interval(right, 20), abs=1e-12)


def test_the_interval_of_estimates_is_the_bootstrap_s_over_problems() -> None:
    random = np.random.default_rng(0)
    chances = random.beta(2, 3, 400)
    values = [pass_at_k(8, right, 2) for right in random.binomial(8, chances)]
    means = random.choice(values, (4000, 400)).mean(1)
    assert mean_interval(values, 8) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=4e-3)


def test_the_interval_of_equal_estimates_is_that_of_all_samples() -> None:
    assert mean_interval([0.5] * 10, 4) == wilson_interval(20, 40)


def test_the_report_counts_each_model_s_samples() -> None:
    base = sampled(("72", "5", "5", "5"), (None, None, None, None), ("6", "6", "6", "1"))
    adapter = sampled(("72", "72", "5", "5"), ("5", "5", "5", None), ("6", "6", "6", "6"))
    report = build_sampled(PROBLEMS, {"base": base, "adapter": adapter}, SAMPLING)
    assert json.loads(json.dumps(report)) == report
    assert {name: report[name] for name in ("num_samples", "temperature", "seed")} == {
        "num_samples": 4,
        "temperature": 1.0,
        "seed": 0,
    }
    assert report["base"]["pass@1"] == pytest.approx((1 + 0 + 3) / 12)
    assert report["base"]["pass@4"] == pytest.approx(2 / 3)
    assert report["base"]["maj@4"] == pytest.approx(1 / 3)
    assert report["adapter"]["maj@4"] == 1.0
    assert report["mcnemar_p"] == mcnemar_p([False, False, True], [True, True, True])
    assert list(report["base"]["ci95"]) == ["pass@1", "pass@2", "pass@4", "maj@4"]
    rows = build_sampled_items(PROBLEMS, {"base": base})
    assert [row["base"]["majority"] for row in rows] == ["5", None, "6"]
    assert [Item(**item) for item in rows[2]["base"]["samples"]] == base[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("evaluated") / "eval.json"
    flags = {"dataset": "arithmetic", "num_items": 6, "max_completion_length": 40}
    return evaluate(EvaluateConfig(model="tiny", num_samples=3, output=output, **flags)), output


def read_samples(output: Path) -> list[list[str]]:
    rows = output.with_name(f"{output.stem}_samples.jsonl").read_text().splitlines()
    return [[item["completion"] for item in json.loads(row)["base"]["samples"]] for row in rows]


def test_samples_come_beside_greedy(report: tuple[dict, Path]) -> None:
    found, output = report
    alone = evaluate(
        EvaluateConfig(model="tiny", dataset="arithmetic", num_items=6, max_completion_length=40)
    )
    assert {name: found[name] for name in alone} == alone
    assert json.loads(output.read_text()) == found
    rows = read_samples(output)
    assert [len(row) for row in rows] == [3] * 6
    assert len({text for row in rows for text in row}) > 12


def test_a_sample_depends_on_the_seed_and_its_place_alone(
    report: tuple[dict, Path], tmp_path: Path
) -> None:
    expected = read_samples(report[1])

    def again(**flags) -> list[list[str]]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        known = {"dataset": "arithmetic", "num_items": 4, "max_completion_length": 40}
        evaluate(EvaluateConfig(model="tiny", output=output, **{**known, **flags}))
        return read_samples(output)

    assert again(num_samples=3, batch_size=5) == expected[:4]
    assert [row[:3] for row in again(num_samples=4)] == expected[:4]
    assert again(num_samples=3, seed=1) != expected[:4]
    cold = again(num_samples=3, temperature=1e-4)
    items = report[1].with_name("eval_items.jsonl").read_text().splitlines()
    assert cold == [[json.loads(row)["base"]["completion"]] * 3 for row in items[:4]]


def test_the_table_shows_each_figure_with_its_interval(
    report: tuple[dict, Path], capsys: pytest.CaptureFixture
) -> None:
    Display().results(report[0])
    printed = capsys.readouterr().out
    for name in ("pass@1", "pass@2", "pass@3", "maj@3"):
        low, high = report[0]["sampled"]["base"]["ci95"][name]
        assert f"({100 * low:.1f} to {100 * high:.1f} %)" in printed
    assert "3 completions per problem, temperature 1, seed 0" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_samples": 0}, "--num-samples must be at least 1, got 0"),
        ({"num_samples": 4, "temperature": 0.0}, "--temperature must be greater than 0, got 0"),
        ({"temperature": 0.7}, "--temperature 0.7 is for samples: add --num-samples"),
        ({"num_samples": 4, "seed": -1}, "--seed must be from 0"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(model="tiny", **flags)


def test_samples_of_an_earlier_evaluation_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "eval_samples.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"eval_samples.jsonl exists already"):
        EvaluateConfig(model="tiny", output=tmp_path / "eval.json")
