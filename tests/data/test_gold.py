"""The gold answer in its field, and how a column writes numbers."""

import pytest

from lora_grpo.data.gold import (
    choose_separator,
    describe_units,
    describe_unreadable,
    extract_gold,
    find_golds,
)

SENTENCES = [f"Together Ann has {n} pens." for n in range(10)]


@pytest.mark.parametrize(
    ("field", "gold"),
    [
        ("48/2=24\n48+24=72\n#### 72", "72"),
        ("#### 1 was wrong\n####  2 ", "2"),
        (r"\boxed{1}, no, \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a{b}{c{d}}e} f}", "a{b}{c{d}}e"),
        (r"\boxed{3} then #### 4", "4"),
        (r"cut \boxed{3", r"cut \boxed{3"),
        (" 12 ", "12"),
        (r"so $\boxed 5$", "5"),
        (r"so \boxed5.", "5"),
        (r"so \fbox{5}", "5"),
        (r"\boxed{\frac{1}{2}} and so \boxed{7}.", "7"),
        ("We add.\n#### Answer: 5", "5"),
        ("#### **5**", "5"),
        ("#### 5\n\nHope this helps!", "5"),
        ("#### Step 1\nx\n#### Conclusion\nso \\boxed{5}", "5"),
        ("Ann starts with 1. Together that makes **5** pens.", "5"),
        ("**Step 1**: 2 + 3\n**5**", "5"),
        ("2 + 3 = 5. The answer is: 5", "5"),
        ("2 + 3 = 5. The final answer is 5.", "5"),
        ("Die Antwort ist 5.", "5"),
        ("<think>2 + 3</think><answer>5</answer>", "5"),
        ("#### 1,234", "1,234"),
        # not one number that it can be
        ("**2** and **3**", "**2** and **3**"),
        ("First 2 and then 3 pens.", "First 2 and then 3 pens."),
        (r"\boxed{x^2+1} in 3 steps", "x^2+1"),
        ("#### x + 1", "x + 1"),
        (r"**2** \boxed{3}, the answer is 4 #### x + 1", "x + 1"),
        (r"**2** and so \boxed{x + 1}", "x + 1"),
    ],
)
def test_the_gold_answer_is_what_can_be_one_number(field: str, gold: str) -> None:
    assert extract_gold(field) == gold


def test_the_only_number_of_a_sentence_counts_where_the_column_is_of_such_sentences() -> None:
    golds, [note] = find_golds(SENTENCES)
    assert [gold.answer for gold in golds] == [str(n) for n in range(10)]
    assert "10 of 10" in note and "'0'" in note
    others = [str(n) for n in range(30)] + SENTENCES[:2]
    assert [gold.answer for gold in find_golds(others)[0]] == others


@pytest.mark.parametrize(
    "text",
    [
        *("The result is about x = 5 pens", "Together that makes 5 million pens", "It is 2x then"),
        *("The route is A4 to Rome", "Henry was the 8th of them", "World War 2", "So 3/4 are left"),
    ],
)
def test_a_number_inside_of_something_else_is_not_the_answer(text: str) -> None:
    assert find_golds([text] * 5)[0][0].answer == text


@pytest.mark.parametrize(
    ("answers", "separator"),
    [
        (["1,5", "2", "3"], "comma"),
        (["1.234,5", "7"], "comma"),
        (["1.234.567", "1.000"], "comma"),
        (["0,5 %", "1,0 %"], "comma"),
        (["1,5", "0.5"], "point"),  # of both kinds: nothing is decided against the usual
        (["1,200", "3"], "point"),
        (["1.5", "2"], "point"),
    ],
)
def test_the_decimal_separator_is_decided_by_what_can_be_read(
    answers: list[str], separator: str
) -> None:
    found, notes = choose_separator(answers)
    assert found == separator
    said = ["decimal comma" in note and "--decimal-separator point" in note for note in notes]
    # The rewards read `1.234,5` as it is meant in any case.
    assert said == ([True] if separator == "comma" and answers[0] != "1.234,5" else [])


@pytest.mark.parametrize(
    "answers",
    [["1,200", "2,400", "2,5"], ["1,500", "2,750", "0,125"]],  # one slip, or decimals throughout
)
def test_what_reads_as_thousands_beside_decimal_commas_is_said(answers: list[str]) -> None:
    separator, [note] = choose_separator(answers)
    assert separator == "point"
    assert f"{answers[0]!r}" in note and "--decimal-separator comma makes it 1." in note


def test_units_are_said() -> None:
    [note] = describe_units(["5", "5 apples", "2000 cm"])
    assert "'2000 cm'" in note and "another unit" in note
    assert describe_units(["5", "5 apples", "A"]) == []


def test_thousands_with_points_are_said_and_can_be_asked_for() -> None:
    answers = ["1.000", "2.000", "17"]
    separator, [note] = choose_separator(answers)
    assert separator == "point"
    assert "'1.000'" in note and "as 1:" in note and "--decimal-separator comma" in note
    assert choose_separator(answers, "comma") == ("comma", [])
    for plain in (["1.000", "0.5"], ["1.25", "3.125"], ["5", "1,000"], []):
        assert choose_separator(plain) == ("point", [])


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        (["A", "(B)", "c.", "D)"], "choices (A, B, C, D)"),
        ([r"\sqrt{2}", "x^2+1"], "formulas"),
        (["Paris", "yes"], "words"),
        (["It is so because it has to be so"] * 2, "free text"),
        (["3:30", "1:2"], "no numbers"),
    ],
)
def test_unreadable_golds_are_described(answers: list[str], what: str) -> None:
    assert what in describe_unreadable(answers)
