"""Rows become problems: columns of many frameworks, what is left out, and what is said of it."""

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from dataset_files import write_rows

from lora_grpo.data.problems import Problem, Reading, load_problems, read_problems

ROWS = [
    {"question": "How many clips?", "answer": "48/2=24\n48+24=72\n#### 72"},
    {"question": 'Quotes ", commas, and\na line break', "answer": "3.5"},
    {"question": "Unicode line ends \u2028 \u2029 \x85 \x0b \x0c \x1c stay inside", "answer": "-4"},
]
PROBLEMS = [
    Problem(1, "How many clips?", "72", "48/2=24\n48+24=72"),
    Problem(2, ROWS[1]["question"], "3.5"),
    Problem(3, ROWS[2]["question"], "-4"),
]
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "#### 5"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": r"so \boxed{5}"}


def read(tmp_path: Path, *rows: Any, **named: str) -> Reading:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(list(rows)))
    return read_problems(str(path), **named)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_each_kind_of_file_gives_the_same_problems(tmp_path: Path, name: str) -> None:
    assert load_problems(write_rows(tmp_path / name, ROWS)) == PROBLEMS


def test_the_built_in_problems_need_no_file() -> None:
    train, test = load_problems("arithmetic"), load_problems("arithmetic", "test")
    assert (len(train), len(test)) == (4000, 512)
    assert all(problem.solution.endswith(f"={problem.answer}") for problem in test)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        load_problems("arithmetic", "dev")


# Columns


@pytest.mark.parametrize(
    "row",
    [
        {"id": 9, "Answer": "5", "Question": "q"},
        {"question": "q", "ground_truth": "5"},
        {"question": "q", "Final Answer": "5", "solution": "6"},
        {"problem": "q", "expected_answer": "5", "generated_solution": "6"},
        {"problem": "q", "answer": "5", "solution": "long"},
        {"problem": "q", "answer": None, "solution": r"\boxed{5}"},
        {"instruction": "q", "input": "", "output": "5"},
        {"instruction": "q", "output": "5"},
        {"input": "q", "target": 5},
        {"query": "q", "response": "The answer is: 5", "original_question": "p"},
        {"question": "q", "answer": ["5"]},
        {"question": "q", "answer": [["5"]]},
        {"question": "q", "answer": '["5"]'},
        {"question": "q", "answers": ["five", "5"]},
        {"question": "q", "answer": {"value": "5", "unit": "cm"}},
        {"question": "q", "answers": {"text": ["5"], "answer_start": [3]}},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"messages": [USER], "ground_truth": "5", "dataset": "gsm8k"},
        {"conversations": [HUMAN, GPT]},
        [HUMAN, GPT],
        {"prompt": [USER], "solution": "5"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "answer": 5},
        {"messages": str([USER, ASSISTANT])},  # as pandas writes it into CSV
        {"question": "q", "answer": "['5']"},
        {"prompt": str([USER]), "reward_model": json.dumps({"style": "rule", "ground_truth": "5"})},
        {"body": {"messages": [USER]}, "reward_model": "{'ground_truth': ['5']}"},
        {
            "data_source": "gsm8k",
            "prompt": [USER],
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"answer": "#### 6", "question": "raw", "split": "train"},
        },
    ],
)
def test_question_and_answer_are_found(tmp_path: Path, row: Any) -> None:
    [problem, _] = read(tmp_path, row, row).problems
    assert (problem.question, problem.answer) == ("q", "5")


def test_named_columns_win_over_the_usual_ones_also_inside_of_a_struct(tmp_path: Path) -> None:
    row = {"question": "no", "answer": "0", "item": {"text": "q", "gold": "5", "level": 1}}
    assert read(tmp_path, row).problems == [Problem(1, "no", "0")]
    named = read(tmp_path, row, question_column="item.text", answer_column="gold")
    assert named.problems == [Problem(1, "q", "5")]


def test_an_alpaca_input_belongs_to_the_question(tmp_path: Path) -> None:
    reading = read(tmp_path, {"instruction": "Add.", "input": "2 and 3", "output": "5"})
    assert reading.problems[0].question == "Add.\n2 and 3"
    assert "instruction + input" in reading.notes[0]


def test_columns_are_joined_by_plus_and_unused_text_is_said(tmp_path: Path) -> None:
    row = {"Body": "Ann has 2.", "Question": "How many?", "options": ["A) 1", "B) 2"], "answer": 2}
    body, options = read(tmp_path, row).notes
    assert "--question-column Body+Question" in body
    assert "--question-column Question+options" in options
    joined = read(tmp_path, row, question_column="body+question+OPTIONS")
    assert joined.problems[0].question == "Ann has 2.\nHow many?\nA) 1\nB) 2"
    assert joined.notes[1:] == ()


def test_the_struct_that_holds_the_question_is_no_unused_text(tmp_path: Path) -> None:
    [note] = read(tmp_path, {"body": {"messages": [USER]}, "answer": "5"}).notes
    assert "question from body.messages" in note


def test_a_german_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    text = "\ufeffFrage;Antwort\r\nWie viel ist 1,5 + 1?;2,5\r\nUnd 1.000 + 1,5?;1.001,5\r\n"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match="among Frage, Antwort: name the question's by --question"):
        read_problems(str(path))
    reading = read_problems(str(path), question_column="frage", answer_column="Antwort")
    assert [problem.answer for problem in reading.problems] == ["2.5", "1001.5"]
    assert reading.decimal_separator == "comma"


def test_what_is_left_out_of_a_chat_is_said(tmp_path: Path) -> None:
    system, first = {"role": "system", "content": "You teach."}, {"role": "user", "content": "p"}
    row = {"messages": [system, first, {"role": "assistant", "content": "1"}, USER, ASSISTANT]}
    reading = read(tmp_path, row)
    assert reading.problems == [Problem(1, "q", "5")]
    text = " ".join(reading.notes)
    assert "'You teach.'" in text and "--system-prompt-file" in text and "several questions" in text


def test_questions_that_ask_for_another_form_are_said(tmp_path: Path) -> None:
    asking = "How many? Put the answer after #### at the end."
    [note] = read(tmp_path, {"question": asking, "answer": "5"}).notes
    assert "1 questions" in note and "####" in note and "<answer>" in note
    assert read(tmp_path, {"question": "How many?", "answer": "#### 5"}).notes == ()


def test_of_several_answers_the_first_number_counts_and_it_is_said(tmp_path: Path) -> None:
    reading = read(tmp_path, {"question": "q", "answer": ["five", "5", "7"]})
    assert reading.problems[0].answer == "5"
    assert "several answers" in reading.notes[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(42, "42"), (-7, "-7"), (0, "0"), ("  8 ", "8"), (10**20, "1" + "0" * 20)],
        *[(1e16, "10000000000000000"), (2.0107e-06, "0.0000020107"), (5.0, "5"), (0.3, "0.3")],
    ],
)
def test_numbers_are_written_as_people_write_them(tmp_path: Path, value: Any, text: str) -> None:
    assert read(tmp_path, {"question": "q", "answer": value}).problems[0].answer == text


def test_parquet_s_own_decimals_are_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"question": "q", "answer": Decimal("3.50")}])
    assert load_problems(path)[0].answer == "3.50"


def test_a_reward_is_given_the_row_as_it_was(tmp_path: Path) -> None:
    row = {"question": "q", "answer": ["5"], "level": 3}
    assert read(tmp_path, row).problems[0].columns == row


def test_rows_without_a_question_or_an_answer_are_left_out_and_named(tmp_path: Path) -> None:
    reading = read(
        tmp_path,
        {"question": "q", "answer": ""},
        {"question": "q", "answer": "1"},
        {"question": "  ", "answer": "1"},
        {"question": "q"},
        {"question": "q", "answer": float("nan")},
        {"question": "r", "answer": 0},
    )
    assert reading.problems == [Problem(2, "q", "1"), Problem(6, "r", "0")]
    assert reading.blank == [1, 3, 4, 5]


# What cannot be read


@pytest.mark.parametrize(
    ("row", "named", "parts"),
    [
        ({"q": "x", "answer": "1"}, {}, ["no column for the question", "among q, answer"]),
        ({"q": "x", "answer": "1"}, {"question_column": "text+q"}, ["no column text"]),
        (
            {"q": "x", "answer": "1"},
            {"question_column": "q", "answer_column": "gold"},
            ["no column gold", "--answer-column"],
        ),
        ({"question": "", "answer": "1"}, {}, ["no usable rows", "question or answer is empty"]),
        ({"question": "q", "answer": {"a": "1", "b": "2"}}, {}, ["row 1", "got a dict"]),
        ({"question": {"a": "q", "b": "r"}, "answer": "1"}, {}, ["row 1", "--question-column"]),
        ({"question": "\ud83d", "answer": "1"}, {}, ["row 1: question holds half a character"]),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, row: dict, named: dict, parts: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^--eval-dataset .*a\.jsonl ") as caught:
        read(tmp_path, row, flag="--eval-dataset", **named)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)
