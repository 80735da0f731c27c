import itertools
import json

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.policy.generate import Completion, cut_at_end
from lora_grpo.results.scoring import (
    Item,
    build_eval_items,
    build_evaluation,
    judge,
    mcnemar_p,
    summarise,
    wilson_interval,
)


def tagged(answer: str, reasoning: str = "48/2=24\n48+24=72") -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def make_item(strict: bool, **changed) -> Item:
    plain = {"lenient": strict, "format": True, "truncated": False, "tokens": 10}
    return Item(completion="", strict=strict, **{**plain, **changed})


@pytest.mark.parametrize(
    ("text", "strict", "lenient", "well_formed"),
    [
        (tagged("72"), True, True, True),
        (tagged("$72.00"), True, True, True),
        (tagged("71"), False, False, True),
        ("It is 72.", False, True, False),
        ("<answer>72</answer>", True, True, False),
        (tagged("72") + "\nbecause 48 is 2 x 24", True, False, False),
        (tagged("about seventy two"), False, True, True),
        (tagged("72") + tagged("72"), False, True, False),
        (tagged("72", reasoning=""), True, True, False),
        ("<reasoning>\n48+24=72\n</reasoning>\n<answer>\n7", False, False, False),
        ("", False, False, False),
    ],
)
def test_strict_reads_the_tags_and_lenient_the_last_number(
    text: str, strict: bool, lenient: bool, well_formed: bool
) -> None:
    item = judge(Problem(1, "How many?", "72"), Completion(text, 17, True))
    assert item == Item(text, strict, lenient, well_formed, truncated=True, tokens=17)


@pytest.mark.parametrize(
    ("ids", "kept", "truncated"),
    [
        ([5, 6, 2, 0, 0], [5, 6, 2], False),
        ([5, 3, 2], [5, 3], False),
        ([2], [2], False),
        ([5, 6, 7], [5, 6, 7], True),
    ],
)
def test_a_completion_ends_with_its_first_end_of_turn(
    ids: list[int], kept: list[int], truncated: bool
) -> None:
    assert cut_at_end(ids, [2, 3]) == (kept, truncated)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(
    successes: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def sign_test(gained: int, lost: int) -> float:
    """Toss a fair coin for each item that differs, in every way there is."""
    tosses = itertools.product((0, 1), repeat=gained + lost)
    extreme = [abs(2 * sum(toss) - gained - lost) >= abs(gained - lost) for toss in tosses]
    return sum(extreme) / len(extreme)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (6, 0), (3, 3), (2, 9), (9, 2)])
def test_mcnemar_counts_every_toss_at_least_as_uneven(gained: int, lost: int) -> None:
    before = [False] * gained + [True] * lost + [True, False, True]
    after = [True] * gained + [False] * lost + [True, False, True]
    assert mcnemar_p(before, after) == pytest.approx(sign_test(gained, lost), abs=1e-12)
    assert mcnemar_p(after, before) == mcnemar_p(before, after)


def test_mcnemar_of_many_items_is_tiny_and_no_overflow() -> None:
    assert mcnemar_p([False] * 1319, [True] * 1319) < 1e-300
    assert 0 < mcnemar_p([False] * 500, [True] * 500) < 1e-100
    assert mcnemar_p([True, False] * 1000, [False, True] * 1000) == 1.0


def test_a_summary_has_design_s_names_and_each_its_own_share() -> None:
    items = [
        make_item(True, tokens=10),
        make_item(True, tokens=20, format=False),
        make_item(False, tokens=30, lenient=True, format=False),
        make_item(False, tokens=64, truncated=True, format=False),
    ]
    assert summarise(items) == {
        "strict_accuracy": 0.5,
        "lenient_accuracy": 0.75,
        "format_rate": 0.25,
        "truncated_rate": 0.25,
        "mean_completion_tokens": 31.0,
        "ci95": list(wilson_interval(2, 4)),
    }


def test_the_report_has_design_s_names_and_a_paired_test_of_two_models() -> None:
    base = [make_item(False)] * 6 + [make_item(True)]
    adapter = [make_item(True)] * 7
    report = build_evaluation("openai/gsm8k:main", "test", {"base": base, "adapter": adapter})
    assert json.loads(json.dumps(report)) == {
        "dataset": "openai/gsm8k:main",
        "split": "test",
        "num_items": 7,
        "base": summarise(base),
        "adapter": summarise(adapter),
        "mcnemar_p": 2 / 64,
    }
    alone = build_evaluation("arithmetic", "test", {"base": base})
    assert list(alone) == ["dataset", "split", "num_items", "base"]


def test_each_problem_gets_a_row_with_design_s_names() -> None:
    problems = [Problem(9, "q0", "1", "worked"), Problem(12, "q1", "2")]
    models = {
        "base": [make_item(False, tokens=1), make_item(False, tokens=2)],
        "adapter": [make_item(True, tokens=3), make_item(False, tokens=4)],
    }
    rows = build_eval_items(problems, models)
    assert [(row["index"], row["question"], row["answer"]) for row in rows] == [
        (0, "q0", "1"),
        (1, "q1", "2"),
    ]
    for name, items in models.items():
        assert [Item(**row[name]) for row in rows] == items
    names = ["completion", "strict", "lenient", "format", "truncated", "tokens"]
    assert list(rows[0]) == ["index", "question", "answer", "base", "adapter"]
    assert list(rows[0]["adapter"]) == names
