"""Datasets in the columns that other frameworks use."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.data.problems import Reading, read_problems

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "#### 5"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": r"so \boxed{5}"}


def read(tmp_path: Path, row: Any, **named: str) -> Reading:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([row, row]))
    return read_problems(str(path), **named)


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "q", "Answer": "5"},
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
        {
            "data_source": "gsm8k",
            "prompt": [USER],
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"answer": "#### 6", "question": "raw", "split": "train"},
        },
    ],
)
def test_question_and_answer_are_found(tmp_path: Path, row: Any) -> None:
    [problem, _] = read(tmp_path, row).problems
    assert (problem.question, problem.answer) == ("q", "5")


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
    with pytest.raises(ValueError, match=r"no column story among .*--question-column"):
        read(tmp_path, row, question_column="story+question")


def test_columns_inside_of_a_struct_can_be_named(tmp_path: Path) -> None:
    row = {"item": {"text": "q", "gold": "5", "level": 1}, "text": "no", "id": "7"}
    named = {"question_column": "item.text", "answer_column": "gold"}
    assert read(tmp_path, row, **named).problems[0].question == "q"
    assert read(tmp_path, row, **named).problems[0].answer == "5"


def test_what_is_left_out_of_a_chat_is_said(tmp_path: Path) -> None:
    system, first = {"role": "system", "content": "You teach."}, {"role": "user", "content": "p"}
    row = {"messages": [system, first, {"role": "assistant", "content": "1"}, USER, ASSISTANT]}
    reading = read(tmp_path, row)
    assert reading.problems[0].question == "q" and reading.problems[0].answer == "5"
    text = " ".join(reading.notes)
    assert "'You teach.'" in text and "--system-prompt-file" in text and "several questions" in text


def test_questions_that_ask_for_another_form_are_said(tmp_path: Path) -> None:
    asking = "How many? Put the answer after #### at the end."
    [note] = read(tmp_path, {"question": asking, "answer": "5"}).notes
    assert "2 questions" in note and "####" in note and "<answer>" in note
    assert read(tmp_path, {"question": "How many?", "answer": "#### 5"}).notes == ()


def test_several_answers_are_said(tmp_path: Path) -> None:
    reading = read(tmp_path, {"question": "q", "answer": ["5", "7"]})
    assert reading.problems[0].answer == "5"
    assert "several answers" in reading.notes[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e16, "10000000000000000"), (2.0107e-06, "0.0000020107"), (5.0, "5"), (0.3, "0.3")],
)
def test_floats_are_written_as_people_write_them(tmp_path: Path, value: float, text: str) -> None:
    assert read(tmp_path, {"question": "q", "answer": value}).problems[0].answer == text


def test_a_missing_number_is_a_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": NaN}\n{"question": "q", "answer": 1.0}\n')
    assert read_problems(str(path)).blank == [1]


def test_a_reward_is_given_the_row_as_it_was(tmp_path: Path) -> None:
    row = {"question": "q", "answer": ["5"], "level": 3}
    assert read(tmp_path, row).problems[0].columns == row
