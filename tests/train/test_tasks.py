"""One run for each kind of task, from preview to push, as a user types it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from commands import FEW, run_here

from lora_grpo.machine.files import read_json, read_jsonl

LENGTH = """
def reward(completions, letters, **columns):
    return [min(len(text) / count, 1.0) for text, count in zip(completions, letters, strict=True)]
"""
OPTIONS = {"label": ["A", "B", "C"], "text": ["3", "5", "9"]}
FORMULAS = (r"\frac{1}{2}", "x^2+1", r"\sqrt{3}", r"2\pi")
ROWS: dict[str, dict[str, Any]] = {
    "choice": {"choices": OPTIONS, "answerKey": "B"},
    "text": {"answer": ["five", "the five"]},
    "math": {"solution": r"So $x$ is \boxed{%s}."},
    "own": {"answer": "anything that is long enough, whatever you may like to write here"},
}
# What the card says, and the gold answer of the first row.
SAID = {
    "choice": ("the option inside", "B"),
    "text": ("the text inside", '["five", "the five"]'),
    "math": ("the formula inside", FORMULAS[0]),
    "own": ("the answer inside", ROWS["own"]["answer"]),
}


def make_row(kind: str, index: int) -> dict[str, Any]:
    row = {"question": f"What is {index} + 2?", "letters": 40} | ROWS[kind]
    if kind == "math":
        row["solution"] %= FORMULAS[index % len(FORMULAS)]
    return row


@pytest.mark.parametrize("kind", ROWS)
def test_a_task_from_preview_to_push(tmp_path: Path, kind: str) -> None:
    if kind == "math" and importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed")
    rows = "\n".join(json.dumps(make_row(kind, index)) for index in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine.py").write_text(LENGTH)
    data = ("--dataset", "rows.jsonl")
    data += ("--task-file", "mine.py", "--accuracy-threshold", "0.5") if kind == "own" else ()

    def run(script: str, *flags: object) -> str:
        done = run_here(script, *flags, home=tmp_path)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    words, gold = SAID[kind]
    previewed = " ".join(run("train_lora.py", *FEW, *data, "--preview").split())
    assert f"task {kind} (" in previewed and repr(gold) in previewed
    if kind == "choice":
        assert "What is 0 + 2? A. 3 B. 5 C. 9" in previewed
    assert f"task: {kind} (" in run("check_rewards.py", *data)
    run("train_lora.py", *FEW, *data, "--quiet")
    run_dir = tmp_path / "adapters/run"
    record = read_json(run_dir / "train_config.json")
    assert record["task"] == kind and bool(record["task_sha256"]) == (kind == "own")
    steps, completions = (
        read_jsonl(run_dir / f"{name}.jsonl") for name in ("metrics", "completions")
    )
    assert all(0 <= step["correct"] <= 1 for step in steps)
    if kind == "own":
        judged = [min(len(row["completion"]) / 40, 1.0) >= 0.5 for row in completions]
        assert [row["correct"] for row in completions] == judged
    found = read_json(run_dir / "eval.json")
    run("evaluate.py", "adapters/run", "--output", "again.json")
    again = read_json(tmp_path / "again.json")
    assert again == {name: found[name] for name in again}
    assert words in (run_dir / "README.md").read_text()
    run("push_to_hub.py", "adapters/run", "--repo", "me/run", "--dry-run")
