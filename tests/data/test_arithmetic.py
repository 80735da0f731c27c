import re
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from lora_grpo.data.arithmetic import (
    ITEMS,
    NAMES,
    PRETRAINING_TEMPLATES,
    SPLITS,
    TEMPLATES,
    Template,
    apply,
    generate_problems,
    solve,
    stream_problems,
)

ROWS = {
    (split, seed): generate_problems(400, split, seed) for split in SPLITS for seed in (0, 1, 12345)
}
EVERY_ROW = [row for rows in ROWS.values() for row in rows]
EVERY_ROW += islice(stream_problems("train", 0, PRETRAINING_TEMPLATES), 1000)
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def exactly(left: int, operator: str, right: int) -> Fraction:
    return {
        "+": Fraction(left + right),
        "-": Fraction(left - right),
        "*": Fraction(left * right),
        "/": Fraction(left, right),
    }[operator]


def skeleton(question: str) -> str:
    """The question less what a split may not depend on: who, and what."""
    return re.sub("|".join([*NAMES, *ITEMS]), "_", question)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert generate_problems(50, "train", 3) == generate_problems(50, "train", 3)
    first, second = ROWS["train", 0], ROWS["train", 1]
    shared = {row["question"] for row in first} & {row["question"] for row in second}
    assert len(shared) < len(first) // 4


def test_a_longer_dataset_begins_with_the_shorter_one_and_the_stream_continues_it() -> None:
    assert generate_problems(60, "test", 0)[:20] == generate_problems(20, "test", 0)
    streamed = {row["question"] for row in islice(stream_problems("train", 0), 1000)}
    assert {row["question"] for row in ROWS["train", 0]} <= streamed


def test_splits_share_no_problem_even_with_other_names_and_across_seeds() -> None:
    seen = {split: set() for split in SPLITS}
    for (split, _), rows in ROWS.items():
        seen[split] |= {skeleton(row["question"]) for row in rows}
    assert min(map(len, seen.values())) > 200
    for split, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not seen[split] & seen[other]
    # A problem may be told twice, with other names, but then in one split.
    counts = Counter(skeleton(row["question"]) for row in ROWS["test", 0] + ROWS["test", 1])
    assert max(counts.values()) > 1


def test_each_step_is_right_of_known_numbers_and_the_last_one_gives_the_answer() -> None:
    for row in EVERY_ROW:
        known = {int(number) for number in re.findall(r"\d+", row["question"])}
        *lines, final = row["answer"].split("\n")
        for line in lines:
            left, operator, right, result = STEP.fullmatch(line).groups()
            assert {int(left), int(right)} <= known, row
            assert exactly(int(left), operator, int(right)) == int(result), row
            known.add(int(result))
        assert final == f"#### {result}", row


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (r"has (\d+) \w+ and buys (\d+) more\.", lambda a, b: a + b),
        (r"has (\d+) \w+ and gives (\d+) of them", lambda a, b: a - b),
        (r"are (\d+) boxes with (\d+) ", lambda a, b: a * b),
        (r"puts (\d+) \w+ into bags of (\d+)\.", lambda a, b: a / b),  # in pre-training only
        (r"has (\d+) \w+, finds (\d+) more and then loses (\d+)\.", lambda a, b, c: a + b - c),
        (r"buys (\d+) packs of (\d+) \w+ and uses (\d+) ", lambda a, b, c: a * b - c),
        (r"has (\d+) \w+\. \w+ has (\d+) more than", lambda a, b: a + a + b),
        (r"has (\d+) \w+ and gets (\d+) more\. .* (\d+) friends", lambda a, b, c: (a + b) / c),
        (
            r"sells (\d+) \w+ for (\d+) dollars each and (\d+) cakes for (\d+)",
            lambda a, b, c, d: a * b + c * d,
        ),
        (
            r"earns (\d+) dollars a day for (\d+) days, is given (\d+) .* spends (\d+)",
            lambda a, b, c, d: a * b + c - d,
        ),
    ],
)
def test_the_answer_is_what_the_words_ask_for(question: str, answer) -> None:
    """The formulas are written here by reading the words, not from the templates' own steps."""
    found = 0
    for row in EVERY_ROW:
        match = re.search(question, row["question"])
        if match:
            found += 1
            expected = answer(*map(int, match.groups()))
            assert float(row["answer"].rpartition("#### ")[2]) == expected, row
    assert found > 50


def test_problems_of_one_two_and_three_steps_and_every_template_are_there() -> None:
    for rows in ROWS.values():
        steps = Counter(row["answer"].count("=") for row in rows)
        assert set(steps) == {1, 2, 3}
        assert min(steps.values()) > len(rows) // 10
    starts = {re.sub(r"\d+", "#", skeleton(row["question"])) for row in ROWS["train", 0]}
    assert len(starts) == len(TEMPLATES)


def test_rows_have_gsm8k_s_form_and_no_question_comes_twice() -> None:
    for rows in ROWS.values():
        assert len(rows) == 400
        assert len({row["question"] for row in rows}) == 400
    for row in EVERY_ROW:
        assert list(row) == ["question", "answer"]
        assert re.fullmatch(r"(?:\S+=\d+\n){1,3}#### [1-9]\d{0,2}", row["answer"])
        assert row["question"].endswith("?") and "{" not in row["question"]


def test_results_that_are_not_small_whole_numbers_are_refused() -> None:
    assert apply("/", 7, 2) is None
    assert apply("-", 3, 3) is None
    assert apply("-", 2, 3) is None
    assert apply("*", 60, 60) is None
    assert apply("/", 12, 4) == 3
    division = Template("{a} in {b}?", {"a": (2, 9), "b": (2, 9)}, (("a", "/", "b"),))
    assert solve(division, {"a": 7, "b": 2}) is None
    assert solve(division, {"a": 8, "b": 2}) == ["8/2=4"]
