"""A task of one's own: parse and same, or a reward with a threshold."""

import json
from pathlib import Path

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.policy.generate import Completion
from lora_grpo.results.scoring import judge
from lora_grpo.rewards.builtin import build_rewards, check_gold, score_with
from lora_grpo.rewards.calls import RewardError
from lora_grpo.rewards.own_task import own_task, recall_task
from lora_grpo.tasks.task import Task

LAST_LINE = """
def parse(completion):
    return completion.strip().splitlines()[-1] if completion.strip() else None
"""
SAME_LENGTH = """
def same(answer, gold, **columns):
    return len(answer) == columns["letters"]
"""
BY_REWARD = """
CALLS = []
def reward(completions, answer, letters, **columns):
    CALLS.append(completions)
    return [len(text) / letters[0] for text in completions]
"""
ROW = {"question": "A word?", "letters": 4}


def write(folder: Path, text: str, threshold: float = 1.0) -> Task:
    (folder / "mine.py").write_text(text)
    return own_task(folder / "mine.py", threshold)


def test_parse_and_same_judge_in_reward_and_evaluation(tmp_path: Path) -> None:
    task = write(tmp_path, LAST_LINE + SAME_LENGTH)
    rewards = build_rewards(task=task)
    assert score_with(rewards, "well:\nwood", "any", **ROW)["correctness"] == 1
    assert score_with(rewards, "well:\nforest", "any", **ROW)["correctness"] == 0
    item = judge(Problem(1, "A word?", "any", columns=ROW), Completion("wood", 1, False), task)
    assert item.strict and item.lenient and not item.format
    assert task.judge("a\nwood", "any", ROW).answer == "wood"
    assert check_gold(["any"], rewards, task) == []


def test_same_alone_reads_the_tags_and_parse_alone_compares_texts(tmp_path: Path) -> None:
    task = write(tmp_path, "def same(answer, gold):\n    return answer[::-1] == gold\n")
    assert task.reads_tags and task.is_right(task.write("so", "abc"), "cba", ROW)
    assert not task.is_right("abc", "cba", ROW)
    assert check_gold(["aba", "abc"], build_rewards(task=task), task) == [1]
    assert write(tmp_path, LAST_LINE).is_right("so\nPARIS.", "Paris", ROW)


def test_a_reward_pays_its_values_and_is_right_from_the_threshold_on(tmp_path: Path) -> None:
    task = write(tmp_path, BY_REWARD, threshold=0.5)
    rewards = build_rewards(task=task)
    assert score_with(rewards, "w", "any", **ROW)["correctness"] == 0.25
    assert [task.is_right("w" * length, "any", ROW) for length in (1, 2, 4)] == [False, True, True]
    calls = task.file.loaded[0]["reward"].__globals__["CALLS"]
    assert calls == [["w"], ["ww"], ["wwww"]], "the reward is asked once of each completion"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "no function parse, same or reward"),
        (
            "def reward(completions):\n    return [1.0]\n",
            r"must end its parameters with \*\*columns",
        ),
        ("def same(:\n", "--task-file .*mine.py cannot be imported: SyntaxError"),
    ],
)
def test_a_file_that_is_no_task_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, text).check()


def test_an_error_in_the_file_names_it_and_what_it_was_given(tmp_path: Path) -> None:
    task = write(tmp_path, "def same(answer, gold):\n    return 1 / 0\n")
    with pytest.raises(RewardError, match=r"mine.py: same raised ZeroDivisionError .*'abc'"):
        task.is_right(task.write("so", "abc"), "abc", ROW)


def test_a_record_remembers_the_file_and_runs_no_other(tmp_path: Path) -> None:
    task = write(tmp_path, BY_REWARD, threshold=0.5)
    record = {"task": "own", "task_file": str(tmp_path / "mine.py"), "task_sha256": task.sha256}
    record |= {"accuracy_threshold": 0.5}
    again = recall_task(json.loads(json.dumps(record)))
    again.check()
    assert again.is_right("ww", "any", ROW)
    (tmp_path / "mine.py").write_text(BY_REWARD + "\n")
    with pytest.raises(ValueError, match="has other contents than when the adapter was trained"):
        recall_task(record).check()
    with pytest.raises(ValueError, match=r"not run by itself: give it by .*--task-file"):
        recall_task(record | {"task_file": "mine.py"}).check()
    assert recall_task({}).name == "number"
