import functools
import json
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_grpo.data.numbers import last_number, parse_number, read_quantity, same_number, to_plain
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.rewards.builtin import (
    build_rewards,
    check_gold,
    parse_reward_weights,
    score,
    score_with,
)

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

PERFECT = "<reasoning>\n48 / 2 = 24\n48 + 24 = 72\n</reasoning>\n<answer>\n72\n</answer>"
NO_REASONING = "<reasoning>\n</reasoning>\n<answer>\n72\n</answer>"
GSM8K = Path(__file__).parents[2].parent / "shared" / "gsm8k"

PIECES = [*NUMBER_TASK.tags, "\n", " ", "x", "7", "72", "-", "\u2212", "$", ",", "."]
PIECES += ["/", "%", "k", "\u0663"]
completions = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
white_space = st.text(" \t\n\r", max_size=5)
numbers = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.integers(-(10**12), 10**12).map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=3).map("{:f}".format),
    st.builds("{}/{}".format, st.integers(-999, 999), st.integers(1, 999)),
)


def write_rewards(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


# The parser


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (PERFECT, "72"),
        ("<answer>  seventy two </answer>", "seventy two"),
        ("so <answer></answer>", ""),
        ("72", None),
        ("<answer>72", None),
        ("72</answer>", None),
        ("</answer>72<answer>", None),
        ("<answer>72</answer><answer>73</answer>", None),
        ("<answer>72</answer></answer>", None),
        ("<answer><answer>72</answer>", None),
        ("<ANSWER>72</ANSWER>", None),
    ],
)
def test_parse_answer_wants_exactly_one_pair_in_order(completion: str, answer: str | None) -> None:
    assert NUMBER_TASK.parse(completion) == answer


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,200", "1200"),
        ("$1200.00", "1200"),
        ("$1,200.00", "1,200"),
        ("1,234,567", "1234567"),
        ("\u22123", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("+3", "3"),
        ("-0", "0"),
        ("50%", "50"),
        ("50 %", "50"),
        ("50 percent", "50"),
        ("72 clips", "72"),
        ("72clips", "72"),
        ("72 clips per day", "72"),
        ("72 clips per day.", "72"),
        ("5 km/h", "5"),
        ("$5/hour", "5"),
        ("$3 per dozen", "3"),
        ("5 m\u00b2", "5"),
        ("72.", "72"),
        ("3.50", "3.5"),
        ("3.50.", "3.5"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("-1/3", "-2/6"),
        ("007", "7"),
        (" 72\n", "72"),
    ],
)
def test_same_number_accepts_other_spellings(left: str, right: str) -> None:
    assert same_number(left, right)
    assert same_number(right, left)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "x",
            "seventy-two",
            "NaN",
            "nan",
            "inf",
            "-inf",
            "1e9999",
            "2^10",
            "0x10",
            "A",
            "yes",
        ],
        *["1,20", "1,2345", "1234,567", "0,200", ",200", "7,2", "1.2.3", "1 20", "0 200"],
        *["3 K", "$3M", "2bn", "7 thirds", "5 squared", "5!", "3万"],
        *["2 and a half", "2 3/2", "2\\frac{3}{2}", "72 or 73", "72 or seventy-three", "$5 $600"],
        *["--3", "-$-3", "- 3", "(3)", "3-", "1/0", "1/2/3", "72...", "~72", "about 72"],
        *["\uff17\uff12", "\u0667", "7\u00a02", "9" * 101, "72" + " very" * 30],
        *[
            "8-i",
            "8i",
            "8 - i",
            "3x",
            "5 x",
            "2ab",
            "8-xy",
            "1/n",
            "5/m",
            "8-m",
            "2\\pi",
            "2\u03c0",
        ],
        *["x^2+1", "\\sqrt{2}", "3+4i", "5^2", "5\u00b2", "16 x^2", "\\frac{1}{2}x", "2**3"],
        *["\\frac123", "\\frac{1}{0}", "(1, 2)", "3:30", "1:2", "3-5", "3 to 5", "2024-01-05"],
        *["$5 cents", "5 dollars and 20 cents", "5 apples, 3 pears", "48 + 24 = 72"],
    ],
)
def test_what_is_no_number_equals_nothing(text: str) -> None:
    assert parse_number(text) is None
    assert not same_number(text, text)


@pytest.mark.parametrize(
    ("left", "right"),
    [("312", "12"), ("3", "-3"), ("72", "720"), ("0.1", "0.10000001"), ("1/3", "0.3333333333")],
)
def test_different_numbers_are_different(left: str, right: str) -> None:
    assert not same_number(left, right)


# Pairs of a gold answer and an answer between the tags: what is exact and unambiguous is paid.
PAID = [
    *[
        ("28%", "28"),
        ("28\\%", "28%"),
        ("28 percent", "28 %"),
        ("50", "50 pct"),
        ("3.5 per cent", "3.5"),
    ],
    *[("9500", "$9{,}500"), ("9500", "9 500"), ("9500", "9\u202f500"), ("9500", "9_500")],
    *[("9500", "9'500"), ("9500", "9.500,00"), ("100000", "1,00,000"), ("10000", "10,\\!000")],
    *[("\\frac{1}{2}", "1/2"), ("\\dfrac12", "0.5"), ("7/2", "3 1/2"), ("3\\frac{1}{2}", "3.5")],
    *[
        ("-1/3", "-\\frac{1}{3}"),
        ("-1/3", "\\frac{-1}{3}"),
        ("1/2", "\u00bd"),
        ("-2.5", "-2\u00bd"),
    ],
    *[("1e5", "100000"), ("5 \\times 10^3", "5000"), ("3x10^2", "300"), ("10^6", "1000000")],
    *[("0.00001", "1e-5"), ("2.0107e-06", "0.0000020107"), ("5e+16", "50000000000000000")],
    *[("10^{-3}", "0.001"), ("3 \u00d7 10\u2078 m/s", "3e8")],
    *[("-5", "\u20135"), ("-5", "minus 5"), ("-5", "negative 5"), ("$-5", "-$5")],
    *[("16", "16 cm^2"), ("16 cm\u00b2", "16 square cm"), ("16 cm2", "16\\text{ cm}^2")],
    *[("16 sq. cm", "16 centimeters squared"), ("90^\\circ", "90 degrees"), ("90", "90\u00b0")],
    *[("20 \u00b0C", "20 degrees Celsius"), ("60 mph", "60 miles per hour"), ("5 m/s", "5")],
    *[("6 feet", "6 ft"), ("12 in", "12 inches"), ("2 h", "2 hours"), ("60\u516c\u91cc", "60 km")],
    *[("60", "\u20b960"), ("60", "60\u5143"), ("60", "Rs. 60"), ("60", "USD 60"), ("60", "US$60")],
    *[
        ("$5", "5 dollars"),
        ("$5/hour", "$5"),
        ("72 clips per day", "72 clips"),
        ("$1.5 million", "1500000"),
    ],
    *[
        ("9 (apples)", "9"),
        ("9 apples", "9 kids"),
        ("5", "5 a\u00f1os"),
        ("3", "3\u4e2a"),
        ("4", "4 men"),
    ],
    *[
        ("72", "\\boxed{72}"),
        ("72", "$72$"),
        ("72 cm", "$$72$$"),
        ("5", "$\\$5$"),
        ("72", "**72**"),
        ("x=72", "72"),
        ("72", "\\(72\\)"),
    ],
    *[("72", "The answer is 72"), ("72", "72,"), ("72", "`72`"), ("72", "#### 72"), ("72", '"72"')],
    *[
        ("5 million", "5000000"),
        ("5k", "5000"),
        ("2 dozen eggs", "24"),
        ("2 hundred thousand", "2e5"),
    ],
]
# Two readings, a unit converted or contradicted, a rounding: not paid, though each is a number.
NOT_PAID = [
    *[("0.28", "28%"), ("50%", "0.5"), ("2 hours", "120 minutes"), ("1 m", "100 cm")],
    *[("5 km", "5 m"), ("2 hours", "2 minutes"), ("16 cm", "16 cm^2"), ("5 apples", "5 km")],
    *[
        ("5 am", "5 pm"),
        ("20 \u00b0C", "20 \u00b0F"),
        ("$5", "5 cents"),
        ("$5", "\u20ac5"),
        ("5%", "5 km"),
    ],
    *[("72 clips per day", "72 clips per hour"), ("60 miles per hour", "60 km per hour")],
    *[("1/3", "0.333"), ("0.3", "0.30000000000000004"), ("33.33", "33.333333333333336")],
    *[("72", "72 million"), ("72", "72k"), ("-5", "5"), ("3.14", "3.14159")],
]


@pytest.mark.parametrize(("gold", "answer"), PAID)
def test_what_is_exact_and_unambiguous_is_paid(gold: str, answer: str) -> None:
    assert same_number(gold, answer) and same_number(answer, gold)
    assert not same_number(gold, f"1{answer}")


@pytest.mark.parametrize(("gold", "answer"), NOT_PAID)
def test_two_readings_or_two_units_are_not_paid(gold: str, answer: str) -> None:
    assert parse_number(gold) is not None and parse_number(answer) is not None
    assert not same_number(gold, answer) and not same_number(answer, gold)


@given(numbers)
def test_same_number_is_reflexive(text: str) -> None:
    assert same_number(text, text)


@given(numbers)
def test_same_number_reads_the_exact_value(text: str) -> None:
    assert parse_number(text) == Fraction(text.replace(",", ""))


WRITTEN = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "-", "$", "x = "]),
    st.sampled_from(
        ["5", "5.0", "10/2", "\\frac{10}{2}", "0.5e1", "6", "2 1/2", "2\u00bd", "5 dozen"]
    ),
    st.sampled_from(
        ["", " km", " kilometers", " m", " apples", " cm^2", "%", " km per hour", "-i"]
    ),
)


@given(WRITTEN, WRITTEN, WRITTEN)
def test_same_number_is_transitive_where_each_writes_as_much(
    first: str, second: str, third: str
) -> None:
    """What one text leaves out is free, so that `5 km` and `5 m` both equal `5`."""
    read = [read_quantity(text) for text in (first, second, third)]
    alike = None not in read and len({(q.unit is None, q.per is None) for q in read}) == 1
    if alike and same_number(first, second) and same_number(second, third):
        assert same_number(first, third)


def write_fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def write_mixed(value: Fraction) -> str:
    whole, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    return f"{sign}{whole} {rest.numerator}/{rest.denominator}" if whole else str(value)


@given(
    st.fractions(-(10**6), 10**6, max_denominator=999),
    st.sampled_from([str, write_fraction, write_mixed]),
    st.sampled_from(["{}", "${}$", "\\boxed{{{}}}", "**{}**", "{} km", "{}.", "\\({}\\)", "= {}"]),
)
def test_writing_a_number_otherwise_never_changes_it(
    value: Fraction, write: Callable[[Fraction], str], around: str
) -> None:
    assert parse_number(around.format(write(value))) == value
    assert parse_number(around.format(write(value)).replace("-", "\u2212")) == value


@given(st.one_of(numbers, completions), st.one_of(numbers, completions))
def test_same_number_is_symmetric_and_never_raises(left: str, right: str) -> None:
    assert same_number(left, right) is same_number(right, left)


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        (PERFECT, "72"),
        ("5-3", "3"),
        ("x-3", "3"),
        ("(5)-3", "3"),
        ("50%-3", "3"),
        ("it is -3", "-3"),
        ("(-3)", "-3"),
        ("= \u22123.", "-3"),
        ("it is \u20133", "-3"),
        ("16 cm^2", "16"),
        ("16 cm\u00b2 or 16 cm2", "16"),
        ("so x^2 = 9, x^{10}", "9"),
        ("\\frac{1}{2}", "1/2"),
        ("3\\frac{1}{2} cups", "3 1/2"),
        ("3\\frac{5}{2}", "5/2"),
        ("is 5 \\times 10^3", "5 \u00d7 10^3"),
        ("2.5e-3.", "2.5e-3"),
        ("9{,}500", "9,500"),
        ("<answer>-3</answer>", "-3"),
        ("-$3", "-$3"),
        ("$-3", "$-3"),
        ("costs $1,200.00.", "1,200.00"),
        ("1/2", "1/2"),
        ("10/2=5", "5"),
        ("1 and .5", ".5"),
        ("72 clips, then 12", "12"),
        ("72 " + "9" * 200, "72"),
        ("none", None),
        ("\u0667\u0662", None),
    ],
)
def test_last_number(completion: str, number: str | None) -> None:
    assert last_number(completion) == number


@given(completions)
@example("$" * 9 + "-.")
def test_last_number_is_a_number_from_the_text(completion: str) -> None:
    found = last_number(completion)
    assert found is None or (found in to_plain(completion) and same_number(found, found))


@pytest.mark.parametrize(
    "completion",
    [
        PERFECT,
        f"\n\n {PERFECT}\n",
        "<reasoning>x</reasoning><answer>72</answer>",
        "<reasoning>x</reasoning>\n\n\t<answer>72</answer>",
    ],
)
def test_white_space_around_the_blocks_is_free(completion: str) -> None:
    assert NUMBER_TASK.has_format(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "72",
        NO_REASONING,
        "<reasoning> </reasoning><answer>72</answer>",
        "<reasoning>x</reasoning><answer>\n</answer>",
        "<reasoning>x</reasoning>",
        "<answer>72</answer>",
        "<answer>72</answer><reasoning>x</reasoning>",
        "<reasoning>x<answer>72</answer></reasoning>",
        "<reasoning>x<answer>72</reasoning></answer>",
        "<reasoning>x</answer>y</reasoning><answer>72",
        f"Sure! {PERFECT}",
        f"{PERFECT} Done.",
        PERFECT.replace("<answer>", "so <answer>"),
        PERFECT + PERFECT,
        PERFECT[:-1],
        PERFECT.upper(),
    ],
)
def test_anything_else_has_no_format(completion: str) -> None:
    assert not NUMBER_TASK.has_format(completion)


# Scores


def test_default_scores() -> None:
    assert score(PERFECT, "72") == {
        "correctness": 1.0,
        "format": 0.2,
        "length_penalty": 0.0,
        "total": 1.2,
    }
    assert score(PERFECT, "73")["total"] == 0.2
    assert score("<answer>72</answer>", "72")["total"] == 1.0
    assert score("The answer is 72", "72")["total"] == 0.0


def test_classic_scores() -> None:
    assert score(PERFECT, "72", "classic") == {
        "correctness": 2.0,
        "integer": 0.5,
        "strict_format": 0.5,
        "soft_format": 0.5,
        "xml_count": 0.5,
        "total": 4.0,
    }
    assert score(NO_REASONING, "72", "classic")["total"] == 3.0
    assert score(PERFECT, "73", "classic")["total"] == 2.0
    assert score(PERFECT, "$72", "classic")["total"] == 4.0
    assert score("72", "72", "classic")["total"] == 0.0


def test_classic_neither_punishes_length_nor_trailing_text_by_its_length() -> None:
    long = PERFECT.replace("48 / 2", "Think. " * 10_000 + "48 / 2")
    assert score(long, "72", "classic")["total"] == 4.0
    short, endless = (score(PERFECT + "\nx" * n, "72", "classic")["total"] for n in (1, 5_000))
    assert short == endless < 4.0


@pytest.mark.parametrize(
    ("answer", "paid"),
    [
        *[("72", 0.5), ("-72", 0.5), ("1,200", 0.5), ("$72", 0.5)],
        *[("72.0", 0), ("72 clips", 0), ("1,20", 0), ("", 0), ("\u0667\u0662", 0), ("1/2", 0)],
    ],
)
def test_classic_integer(answer: str, paid: float) -> None:
    completion = PERFECT.replace("\n72\n<", f"\n{answer}\n<")
    assert score(completion, "72", "classic")["integer"] == paid


def test_classic_counts_each_tag_with_its_line_breaks_once() -> None:
    def count(completion: str) -> float:
        return score(completion, "72", "classic")["xml_count"]

    assert count("<reasoning>\nx") == 0.125
    assert count("<reasoning>\nx\n</reasoning>\nso") == 0.25
    assert count("<reasoning>\nx\n</reasoning>\n<answer>\n72") == 0.375
    assert count("<reasoning>x</reasoning><answer>72</answer>") == 0.0
    assert count(PERFECT + "\n" + PERFECT) == 0.0


@pytest.mark.parametrize("reward_set", ["default", "classic"])
@given(completion=completions, answer=st.one_of(numbers, st.text()))
def test_scores_are_bounded_and_sum_to_their_total(
    reward_set: str, completion: str, answer: str
) -> None:
    scores = score(completion, answer, reward_set)
    rewards = build_rewards(reward_set)
    assert list(scores) == [*(reward.name for reward in rewards), "total"]
    assert all(0 <= scores[reward.name] <= reward.weight for reward in rewards)
    assert scores["total"] == pytest.approx(sum(scores[reward.name] for reward in rewards))


@pytest.mark.parametrize("reward_set", ["default", "classic"])
@given(completion=completions, before=white_space, after=white_space)
@example(completion=PERFECT, before="\n", after=" \n")
def test_scores_ignore_white_space_around(
    reward_set: str, completion: str, before: str, after: str
) -> None:
    assert score(before + completion + after, "72", reward_set) == score(
        completion, "72", reward_set
    )


@pytest.mark.parametrize(
    "nasty",
    [
        *("<answer>", "<reasoning>\n", "</answer><answer>", PERFECT, " ", "\n"),
        *(
            "9",
            "1,",
            "1/",
            "$-",
            "-",
            "111,",
            "1.",
            ". 1",
            "x",
            "^{",
            "\\frac{1",
            "\\text{",
            "1 1/",
            "<reasoning>\n\n</reasoning>\n",
        ),
    ],
)
def test_two_megabytes_of_anything_are_fast(nasty: str) -> None:
    text = nasty * (2_000_000 // len(nasty))
    started = time.perf_counter()
    last_number(text)
    same_number(text, text)
    for completion in (text, f"<reasoning>{text}</reasoning><answer>{text}</answer>"):
        score(completion, "72")
        score(completion, "72", "classic")
    assert time.perf_counter() - started < 5


# Rewards as the trainer calls them


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_functions_take_what_the_trainer_passes(reward_set: str) -> None:
    columns = {"prompts": ["q", "q"], "completion_ids": [[1], [2]], "trainer_state": None}
    chats = [[{"role": "assistant", "content": text}] for text in (PERFECT, "no")]
    for reward in build_rewards(reward_set, max_completion_length=100):
        plain = reward.function(completions=[PERFECT, "no"], answer=["72", "72"], **columns)
        assert plain == reward.function(completions=chats, answer=["72", "72"], **columns)
        assert all(type(value) is float for value in plain)


def trainer_name(function: object) -> str:
    """The rule of TRL's `get_callable_name`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function.__name__


@pytest.mark.parametrize("reward_set", ["default", "classic"])
def test_the_trainer_logs_each_reward_by_its_own_name(reward_set: str, tmp_path: Path) -> None:
    path = write_rewards(tmp_path, "def mine(completions, **columns): return [0.0]")
    for reward in build_rewards(reward_set, (f"{path}:mine",), max_completion_length=10):
        assert trainer_name(reward.function) == reward.function.__name__ == reward.name


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (150, -1)]
)
def test_length_penalty_falls_over_the_last_fifth(length: int, value: float) -> None:
    rewards = build_rewards(max_completion_length=100)
    scores = score_with(rewards, PERFECT, "72", completion_ids=[0] * length)
    assert scores["length_penalty"] == pytest.approx(0.2 * value)


def test_length_penalty_needs_a_limit_and_token_ids() -> None:
    unlimited, limited = build_rewards(), build_rewards(max_completion_length=2)
    assert score_with(unlimited, PERFECT, "72", completion_ids=[0] * 9)["length_penalty"] == 0
    assert score_with(limited, PERFECT, "72")["length_penalty"] == 0


def test_a_batch_of_unequal_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        build_rewards()[0].function(completions=[PERFECT, PERFECT], answer=["72"])


# Building


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Pay:\n    value: float = {}\n"
        "def {}(completions, **columns): return [Pay().value for _ in completions]\n"
    )
    specs = []
    for folder, value, name in (("a", 1.0, "one"), ("b", 2.0, "two")):
        (tmp_path / folder).mkdir()
        specs.append(f"{write_rewards(tmp_path / folder, text.format(value, name))}:{name}")
    one, two = build_rewards("none", tuple(specs))
    assert one.function.__name__ == "one" and one.sha256 != two.sha256
    assert (one.function(completions=["x"]), two.function(completions=["x"])) == ([1.0], [2.0])
    modules = [module for name, module in sys.modules.items() if "custom_reward_mine" in name]
    assert {module.Pay().value for module in modules if hasattr(module, "Pay")} == {1.0, 2.0}


def test_weights_are_changed_by_name() -> None:
    rewards = build_rewards(weights={"format": 0.5})
    assert {reward.name: reward.weight for reward in rewards} == {
        "correctness": 1.0,
        "format": 0.5,
        "length_penalty": 0.2,
    }
    assert parse_reward_weights(("format=0.5", "correctness=2")) == {
        "format": 0.5,
        "correctness": 2.0,
    }


def test_custom_rewards_come_after_the_set(tmp_path: Path) -> None:
    path = write_rewards(
        tmp_path,
        "def brevity(completions, **columns): return [float(len(c) < 100) for c in completions]\n"
        "def maybe(completions, answer, **columns): return [None for gold in answer]\n",
    )
    rewards = build_rewards("none", (f"{path}:brevity=0.5", f"{path}:maybe"), {"brevity": 3})
    assert [(reward.name, reward.weight) for reward in rewards] == [("brevity", 3), ("maybe", 1.0)]
    assert score_with(rewards, PERFECT, "72") == {"brevity": 3.0, "total": 3.0}
    chat = [{"role": "assistant", "content": PERFECT}]
    assert rewards[0].function(completions=[chat], answer=["72"]) == [1.0]
    assert rewards[1].function(completions=[chat], answer=["72"]) == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_set": "best"}, "must be one of default, classic, none, got 'best'"),
        ({"reward_set": "none"}, "--reward-set none leaves no reward: add one"),
        ({"weights": {"form": 1.0}}, "one of correctness, format, length_penalty, got 'form'"),
        ({"custom": ("mine.py",)}, "must look like path/to/file.py:function=0.5, got 'mine.py'"),
        ({"custom": (":mine",)}, "must look like"),
        ({"custom": ("FILE:",)}, "must look like"),
        ({"custom": ("FILE:good=much",)}, "weight must be a number such as 0.5, got 'much'"),
        ({"custom": ("FILE:good=",)}, "weight must be a number such as 0.5, got ''"),
        ({"custom": ("FILE:good=nan",)}, "weight must be a number"),
        ({"custom": ("rewards.txt:good",)}, "must name a .py file, got rewards.txt"),
        ({"custom": ("FILE:nope",)}, r"no function 'nope': it has good, correctness, slow, bare$"),
        ({"custom": ("FILE:Thing",)}, "no function 'Thing'"),
        ({"custom": ("FILE:slow",)}, "is an async function: make it a plain `def`"),
        ({"custom": ("FILE:bare",)}, r"must end its parameters with \*\*columns"),
        ({"custom": ("FILE:good", "FILE:good")}, "gives the name 'good' twice"),
        ({"custom": ("FILE:correctness",)}, "gives the name 'correctness' twice"),
    ],
)
def test_what_cannot_be_built_says_why(arguments: dict, message: str, tmp_path: Path) -> None:
    path = write_rewards(
        tmp_path,
        "from json import loads\n"
        "class Thing: pass\n"
        "def good(completions, **columns): return [1.0]\n"
        "def correctness(completions, **columns): return [1.0]\n"
        "async def slow(completions, **columns): return [1.0]\n"
        "def bare(completions, answer): return [1.0]\n",
    )
    custom = tuple(spec.replace("FILE", path) for spec in arguments.get("custom", ()))
    with pytest.raises(ValueError, match=message):
        build_rewards(**{**arguments, "custom": custom})


@pytest.mark.parametrize("pair", ["format", "=1", "format=", "format=x", "format=inf"])
def test_a_weight_that_cannot_be_read_says_why(pair: str) -> None:
    with pytest.raises(ValueError, match=r"^--reward-weight"):
        parse_reward_weights((pair,))


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.py does not exist: check the path"):
        build_rewards(custom=(f"{tmp_path}/gone.py:mine",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", r"cannot be imported: ModuleNotFoundError .* at mine\.py:1"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_fails_on_import_says_why(text: str, message: str, tmp_path: Path) -> None:
    path = write_rewards(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        build_rewards(custom=(f"{path}:mine",))


def test_an_error_in_a_custom_reward_names_it_and_the_completion(tmp_path: Path) -> None:
    path = write_rewards(
        tmp_path, "def mine(completions, **columns):\n    return [1 / len(c) for c in completions]"
    )
    [reward] = build_rewards("none", (f"{path}:mine",))
    message = r"reward 'mine' raised ZeroDivisionError .* at mine\.py:2, on the completion ''"
    with pytest.raises(RuntimeError, match=message) as caught:
        reward.function(completions=["fine", "", "fine"], answer=["1", "2", "3"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_that_only_the_batch_raises_shows_its_first_completion(tmp_path: Path) -> None:
    path = write_rewards(tmp_path, "def mine(completions, **columns):\n    [c] = completions")
    [reward] = build_rewards("none", (f"{path}:mine",))
    with pytest.raises(RuntimeError, match="on a batch of 2, the first completion 'one'"):
        reward.function(completions=["one", "two"], answer=["1", "2"])


def test_a_recipe_for_chats_is_told_that_completions_are_strings(tmp_path: Path) -> None:
    path = write_rewards(
        tmp_path, "def mine(completions, **columns): return [c[0]['content'] for c in completions]"
    )
    with pytest.raises(RuntimeError, match="it gets completions as plain strings"):
        score_with(build_rewards("none", (f"{path}:mine",)), PERFECT, "72")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0, 2.0]", "'mine' returned 2 values for 1 completions"),
        ("[]", "'mine' returned 0 values for 1 completions"),
        ("None", "'mine' must return a list of numbers, one a completion, got None"),
        ("1.0", "'mine' must return a list of numbers"),
        ("'5'", "'mine' must return a list of numbers"),
        ("['5']", "'mine' returned '5': return a finite number, or None"),
        ("[float('nan')]", "'mine' returned nan: return a finite number"),
        ("[float('inf')]", "'mine' returned inf: return a finite number"),
    ],
)
def test_a_wrong_result_of_a_custom_reward_says_why(
    result: str, message: str, tmp_path: Path
) -> None:
    path = write_rewards(tmp_path, f"def mine(completions, **columns): return {result}")
    with pytest.raises(ValueError, match=message):
        score_with(build_rewards("none", (f"{path}:mine",)), PERFECT, "72")


# Gold answers


def test_gold_answers_that_can_never_be_paid_are_found(tmp_path: Path) -> None:
    answers = ["72", "1,200", "x + 1", "-3", "", "1e9999", "{brace}"]
    assert check_gold(answers, build_rewards()) == [2, 4, 5, 6]
    assert check_gold(answers, build_rewards("classic")) == [2, 4, 5, 6]
    path = write_rewards(tmp_path, "def mine(completions, **columns): return [0.0] * 7")
    assert check_gold(answers, build_rewards("none", (f"{path}:mine",))) == []


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K files in ../shared/gsm8k")
@pytest.mark.parametrize(("split", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_answer_scores_full_marks(split: str, num_rows: int) -> None:
    lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    assert len(answers) == num_rows
    assert check_gold(answers, build_rewards()) == []
    assert all(same_number(answer, answer.replace(",", "")) for answer in answers)
