"""The splits of procedural problems: disjoint, repeatable, and of the sizes that were asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_files import write_rows

from lora_grpo.data.problems import Reading, normalise, read_problems
from lora_grpo.data.prompt import PromptStyle
from lora_grpo.data.worked import write_completion
from lora_grpo.tasks.reasoning_gym import REASONING_GYM, score
from lora_grpo.tasks.task import NUMBER_TASK

pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym (a C compiler)")
ROOT = Path(__file__).parents[2]
SIZES = ":size=60:test_size=20"
# Numbers, words, weekdays.
THREE = ["chain_sum", "spell_backward", "calendar_arithmetic:tasks=weekday_offset"]
SMALL = "chain_sum:max_terms=2:max_digits=1"


def both(text: str) -> list[Reading]:
    return [read_problems(f"reasoning-gym:{text}", split) for split in ("train", "test")]


def questions(reading: Reading) -> set[str]:
    return {normalise(problem.question) for problem in reading.problems}


@pytest.mark.parametrize("name", THREE)
def test_train_and_test_share_no_seed_and_no_question(name: str) -> None:
    train, test = both(name + SIZES)
    assert (len(train.problems), len(test.problems)) == (60, 20)
    assert (len(questions(train)), len(questions(test))) == (60, 20)
    assert not questions(train) & questions(test)
    places = [{(p.columns["seed"], p.columns["index"]) for p in r.problems} for r in (train, test)]
    assert not places[0] & places[1]
    assert all(
        score(problem.answer, problem.columns) == 1
        for reading in (train, test)
        for problem in reading.problems
    )
    assert train.task is REASONING_GYM and train.notes == ()


@pytest.mark.parametrize("name", THREE)
def test_a_warm_up_and_an_example_find_a_solution(name: str) -> None:
    problem = both(name + SIZES)[0].problems[0]
    text = write_completion(problem, PromptStyle(task=REASONING_GYM))
    assert text is not None and REASONING_GYM.is_right(text, problem.answer, problem.columns)
    if name == "chain_sum":
        assert f"{problem.columns['metadata']['expression']} = {problem.answer}" in text


def test_a_small_space_is_shared_out_whatever_the_seed() -> None:
    train, test = both(SMALL)
    others = both(f"{SMALL}:seed=5")
    assert len(train.problems) > 5 * len(test.problems) > 50
    assert "178 different train questions" in train.notes[0] and "2,000" in train.notes[0]
    assert questions(others[1]) == questions(test)
    assert not questions(others[0]) & questions(test)
    with pytest.raises(ValueError, match="too few different questions for a test split"):
        both("calendar_arithmetic:tasks=is_leap_year:leap_year_range=1")


def test_another_seed_draws_other_training_problems_and_the_same_test() -> None:
    train, test = both("spell_backward" + SIZES)
    other, same = both(f"spell_backward{SIZES}:seed=1")
    assert len(questions(train) & questions(other)) < 10
    assert questions(same) == questions(test)


def test_the_problems_of_several_generators_are_mixed_by_their_sizes() -> None:
    train, _ = both("spell_backward:size=30,chain_sum:size=90")
    first = [problem.columns["metadata"]["source_dataset"] for problem in train.problems[:40]]
    assert first.count("spell_backward") == 10


DRAW = """
import json, sys
from lora_grpo.data.problems import read_problems
reading = read_problems(sys.argv[1], "test")
print(json.dumps([[problem.question, problem.answer] for problem in reading.problems]))
"""


def test_another_process_draws_the_same() -> None:
    name = "reasoning-gym:" + ",".join(text + SIZES for text in THREE)
    done = subprocess.run(
        [sys.executable, "-c", DRAW, name],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    here = read_problems(name, "test").problems
    assert json.loads(done.stdout) == [[problem.question, problem.answer] for problem in here]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("complex_arithmetic", "complex_arithmetic cannot be trained on.* pays the answer 'nan'"),
        ("propositional_logic", "propositional_logic gives no gold answers"),
        ("chain_sun", "--dataset reasoning-gym:chain_sun: .*perhaps you meant chain_sum"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_problems(f"reasoning-gym:{name}")


def test_the_task_and_the_dataset_must_fit(tmp_path: Path) -> None:
    chain = "reasoning-gym:chain_sum" + SIZES
    assert read_problems(chain, task=NUMBER_TASK).task is NUMBER_TASK
    with pytest.raises(ValueError, match=r"no columns: leave --question-column"):
        read_problems(chain, question_column="q")
    path = write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "5"}])
    with pytest.raises(ValueError, match=r"a\.jsonl: the task reasoning-gym judges only"):
        read_problems(path, task=REASONING_GYM)
