"""Multiple choice: options as questions list them, and what names one of them."""

import pytest

from lora_grpo.tasks.choice import CHOICE_TASK, find_options, last_choice, read_choice

QUESTION = "Ann has 2 pens and buys 3 more. How many has she? (A) 4 (B) 5 (C) 5 dozen (D) none"
ROW = {"question": QUESTION}
OPTIONS = {"A": "4", "B": "5", "C": "5 dozen", "D": "none"}


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, OPTIONS),
        ("Which?\nA. red\nB. a  deep\nblue,\nC. none of A and B\nAnswer:", None),
        ("Which? a ) red , b ) a deep blue , c ) none of A and B", None),
        ("Vitamin A. Which?\n[A] red\n[B] a deep blue\n[C] none of A and B", None),
        ("A: one\nB: two\nNow which?\nA: red\nB: a deep blue\nC: none of A and B", None),
        ("What is f(A) + g(A) for A = 3?", {}),
        ("Who? (B) no (A) list", {}),
    ],
)
def test_options_are_found_as_questions_list_them(question: str, options: dict | None) -> None:
    usual = {"A": "red", "B": "a deep blue", "C": "none of A and B"}
    assert find_options(question) == (usual if options is None else options)


@pytest.mark.parametrize(
    "answer",
    [
        *("B", "b", "(B)", "[B]", "B.", "B)", "**B**", "$B$", r"\boxed{B}", r"\text{(B)}"),
        *("Option B", "Answer: B", "The answer is (B)", "B. 5", "(B) 5", "5", "5.0", " 5. "),
    ],
)
def test_a_letter_or_the_option_s_text_names_it(answer: str) -> None:
    assert CHOICE_TASK.same(answer, "B", ROW)
    assert not any(CHOICE_TASK.same(answer, other, ROW) for other in "ACD")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A or B",
        "B and C",
        "AB",
        "B, C",
        "B. 4",
        "E",
        "45",
        "I think B because 2 + 3 = 5",
        "five?",
    ],
)
def test_hedges_prose_and_contradictions_name_none(answer: str) -> None:
    assert read_choice(answer, OPTIONS) is None


def test_an_option_that_is_listed_twice_is_named_by_its_letter_alone() -> None:
    twice = {"A": "5", "B": "5"}
    assert read_choice("5", twice) is None and read_choice("A", twice) == "A"


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("2 + 3 = 5, so the answer is B.", "B"),
        ("It is not (A), it is (B)", "B"),
        ("**C**\nNo: the correct option is **B**", "B"),
        ("A is wrong. Hence A", "A"),
        ("I see A man. I go on", None),
        ("<answer>5</answer> or C", "5"),
    ],
)
def test_the_last_choice_anywhere(completion: str, letter: str | None) -> None:
    assert last_choice(completion) == letter
