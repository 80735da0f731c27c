"""Gold answers as a task reads them, and the task that they show."""

from pathlib import Path
from typing import Any

import pytest
from dataset_files import write_rows

from lora_grpo.data.problems import Reading, read_problems
from lora_grpo.rewards.builtin import build_rewards, find_unpaid
from lora_grpo.tasks.kinds import find_task

TEXTS = ["4", "5", "6"]
ASKED = "How many?\nA. 4\nB. 5\nC. 6"


def read(folder: Path, *rows: dict[str, Any], task: str = "auto") -> Reading:
    return read_problems(write_rows(folder / "a.jsonl", rows), task=find_task(task))


@pytest.mark.parametrize(
    "row",
    [
        {"choices": {"text": TEXTS, "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"choices": {"text": TEXTS, "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"options": ["A) 4", "B) 5", "C) 6"], "correct": "B"},
        {"options": {"A": "4", "B": "5", "C": "6"}, "answer": "5", "answer_idx": "B"},
        {
            "options": [
                {"label": "A", "text": "4"},
                {"label": "B", "text": "5"},
                {"label": "C", "text": "6"},
            ],
            "answer": "B",
        },
        {"choices": TEXTS, "answer": 1},
        {"endings": TEXTS, "label": "1"},
        {"opa": "4", "opb": "5", "opc": "6", "answer": "(B)"},
        {"A": "4", "B": "5", "C": "6", "answer": "The answer is B."},
        {"answer": "B", "question": ASKED},
    ],
)
def test_options_join_the_question_and_the_gold_answer_is_a_letter(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    row = {"question": "How many?"} | row
    reading = read(tmp_path, row, row, task="choice")
    [problem, _] = reading.problems
    assert (problem.question, problem.answer) == (ASKED, "B")
    assert not any("is not part of the question" in note for note in reading.notes)
    assert find_unpaid(reading.problems, build_rewards(task=reading.task), reading.task) == []


def test_positions_are_counted_from_one_where_one_is_the_last(tmp_path: Path) -> None:
    rows = [{"question": f"q{last}", "choices": TEXTS, "answer": last} for last in (1, 3)]
    reading = read(tmp_path, *rows, task="choice")
    assert [problem.answer for problem in reading.problems] == ["A", "C"]
    assert "counted from 1" in reading.notes[-1]


PLAIN = {
    "number": [{"answer": "5"}, {"answer": "#### 7"}, {"answer": "unknown"}],
    "choice": [{"question": f"{ASKED} ({letter})", "answer": letter} for letter in "ABC"],
    "text": [{"answer": ["Paris", "City of Paris"]}, {"answer": "Rome"}, {"answer": "yes"}],
}


@pytest.mark.parametrize("task", PLAIN)
def test_the_task_is_chosen_from_the_gold_answers_with_a_reason(tmp_path: Path, task: str) -> None:
    rows = [{"question": f"q{index}"} | row for index, row in enumerate(PLAIN[task])]
    reading = read(tmp_path, *rows)
    assert reading.task.name == task and f"of {len(rows)} gold answers" in reading.why_task
    asked = read(tmp_path, *rows, task=task)
    assert asked.problems == reading.problems and "--task" in asked.why_task


def test_positions_beside_options_stay_numbers_and_the_flag_is_named(tmp_path: Path) -> None:
    reading = read(tmp_path, {"question": "q", "choices": TEXTS, "answer": 1})
    assert reading.task.name == "number" and "--task choice" in reading.why_task


def test_a_doubt_names_the_flag(tmp_path: Path) -> None:
    essay = "It falls because the earth pulls at everything, also at what is far away from it."
    reading = read(tmp_path, {"question": "q", "answer": essay}, {"question": "r", "answer": "up"})
    assert reading.task.name == "number" and "in doubt" in reading.why_task
    assert "--task" in reading.why_task


def test_each_of_several_gold_answers_is_right(tmp_path: Path) -> None:
    [problem, _, _] = read(tmp_path, *[{"question": "q"} | row for row in PLAIN["text"]]).problems
    [correctness, *_] = build_rewards(task=find_task("text"))
    texts = [f"<answer>{text}</answer>" for text in ("paris", "the City of Paris", "Rome")]
    assert correctness.function(completions=texts, answer=[problem.answer] * 3) == [1, 1, 0]
