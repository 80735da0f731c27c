"""The difficulty filter: what it leaves, in which order, and that no kill changes it."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from killed_runs import SMALL, finish, kill_at, lines_of, start
from run_directory import contents, read_rows

from lora_grpo.config.presets import check_resume
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.machine.files import read_jsonl
from lora_grpo.train.console import Display
from lora_grpo.train.difficulty import find_candidates, keep_solvable, measure
from lora_grpo.train.plan import make_plan

FILTER = {
    **SMALL,
    "max_steps": 3,
    "difficulty_filter": True,
    "difficulty_samples": 3,
    "difficulty_problems": 32,
    "curriculum": True,
    "run_name": "run",
}


def cached(home: Path) -> list[Path]:
    return [*home.glob(".difficulty/*.jsonl")]


def test_kills_while_sampling_and_training_change_nothing(children, tmp_path: Path) -> None:
    whole, parts, outcome = tmp_path / "whole", tmp_path / "parts", tmp_path / "outcome"
    finish(children, outcome, **FILTER, adapters_dir=whole)
    process = start(children, outcome, **FILTER, adapters_dir=parts)
    kill_at(process, lambda: any(lines_of(path.name, 16)(path.parent) for path in cached(parts)), 0)
    (half,) = cached(parts)
    assert not (parts / "run/difficulty.jsonl").exists() and len(read_jsonl(half)) < 32
    with half.open("a") as file:
        file.write('{"number": 31, "rig')  # a kill in the middle of a line
    process = start(children, outcome, resume=parts / "run")
    kill_at(process, lambda: lines_of("metrics.jsonl", 2)(parts / "run"), 0.0)
    assert [path.name for path in cached(parts)] == [path.name for path in cached(whole)]
    assert half.read_text() == cached(whole)[0].read_text()
    shutil.rmtree(half.parent)  # the run has its own copy
    finish(children, outcome, resume=parts / "run")
    assert not cached(parts)
    for run in (whole / "run", parts / "run"):
        rows = {row["row"]: row["right"] for row in read_jsonl(run / "difficulty.jsonl")}
        assert len(rows) == 32 and read_rows(run / "validation.jsonl")[-1]["num_items"] == 8
    assert contents(parts / "run") == contents(whole / "run")
    solved = solved_by_step(whole / "run")
    assert set().union(*solved) == {1, 2}, "of three samples: neither never nor always"
    pairs = itertools.pairwise(solved)
    assert all(min(easier) >= max(harder) for easier, harder in pairs)


def solved_by_step(run: Path) -> list[set[int]]:
    """Return how often the problems of each step were solved when they were sampled."""
    plan = make_plan(TrainConfig(**{**FILTER, "adapters_dir": run, "run_name": None}))
    questions = {problem.row: problem.question for problem in find_candidates(plan)}
    rows = read_jsonl(run / "difficulty.jsonl")
    right = {questions[row["row"]]: row["right"] for row in rows}
    steps: dict[int, set[int]] = {}
    for row in read_rows(run / "completions.jsonl"):
        steps.setdefault(row["step"], set()).add(right[row["question"]])
    return list(steps.values())


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("plan")
    return make_plan(TrainConfig(**{**FILTER, "adapters_dir": home, "difficulty_problems": 6}))


def result(number: int, right: int) -> dict:
    rest = {"row": number, "samples": 3, "in_tags": 0, "truncated": 1}
    return {"number": number, "right": right, **rest}


def test_what_is_always_or_never_right_is_left_out_and_counted(plan, capsys) -> None:
    rows = [result(number, right) for number, right in enumerate((0, 1, 3, 2, 0, 0))]
    candidates = find_candidates(plan)
    assert keep_solvable(plan, rows, Display()) == [candidates[1], candidates[3]]
    told = " ".join(capsys.readouterr().out.split())
    assert "0/3 3, 1/3 1, 2/3 1, 3/3 1; 2 are kept" in told and "33.3 % were cut off" in told
    with pytest.raises(ValueError, match=r"leaves 1 problems, fewer than the 2 of a step.*0/3 5"):
        keep_solvable(plan, [result(0, 1), *(result(n, 0) for n in range(1, 6))], Display(True))


def test_what_another_run_sampled_is_not_sampled_again(plan, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    rows = [result(number, 1) for number in range(9)]  # of a run with more problems
    cache.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measure(plan, None, cache, Display(quiet=True)) == rows[:6]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_steps": None}, "--max-steps None"),
        ({"difficulty_problems": 1}, "--difficulty-problems must be at least 2, .*got 1"),
        ({"difficulty_samples": 1}, "--difficulty-samples must be at least 2, got 1"),
        ({"difficulty_filter": False}, "--curriculum needs --difficulty-filter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainConfig(**{**FILTER, **settings})


def test_a_curriculum_cannot_be_prolonged() -> None:
    saved, longer = (TrainConfig(**{**FILTER, "max_steps": steps}) for steps in (3, 8))
    with pytest.raises(ValueError, match="--max-steps was 3, now 8: --curriculum"):
        check_resume(saved, longer)
