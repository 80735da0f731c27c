"""A run is read from its own files, or from what any TRL trainer leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import make_trainer
from trl import GRPOTrainer

from lora_grpo.diagnosis.history import read_history
from lora_grpo.diagnosis.rules import diagnose

SCRIPT = Path(__file__).parents[2] / "scripts/diagnose.py"
CUT_OFF = {"max_steps": 6, "max_completion_length": 1, "num_generations": 2}
CUT_OFF |= {"per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    """Plain TRL, whose completions are all cut off."""
    trainer = make_trainer(tmp_path_factory.mktemp("trl"), GRPOTrainer, **CUT_OFF)
    trainer.train()
    return trainer


def test_plain_trls_log_is_diagnosed(trained: GRPOTrainer, tmp_path: Path) -> None:
    """As a list of rows, one row per line, and a trainer's state in its newest checkpoint."""
    rows = trained.state.log_history
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trained.state.save_to_json(str(tmp_path / "checkpoint-100/trainer_state.json"))
    (tmp_path / "checkpoint-20/trainer_state.json").write_text("{}")
    for name in (
        "list.json",
        "rows.jsonl",
        "checkpoint-100",
        ".",
        "checkpoint-100/trainer_state.json",
    ):
        history = read_history(tmp_path / name)
        assert [row["step"] for row in history.steps] == [1, 2, 3, 4, 5, 6]
        assert history.steps[0]["clipped_ratio"] == 1.0
        assert history.steps[0]["completion_length"] == 1.0
        assert history.steps[0]["correct"] == 0.0
        assert history.settings["learning_rate"] == rows[0]["learning_rate"]
        assert diagnose(history)[0].rule == "truncated"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_names_faults_or_says_that_there_is_none(
    trained: GRPOTrainer, tmp_path: Path
) -> None:
    (tmp_path / "log.json").write_text(json.dumps(trained.state.log_history))
    assert run(tmp_path / "log.json").stdout.startswith("truncated, since step 1: 100 %")
    found = json.loads(run(tmp_path / "log.json", "--json").stdout)
    assert found["steps"] == 6 and found["findings"][0]["rule"] == "truncated"
    row = {"step": 1, "reward": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run(tmp_path).stdout.startswith("nothing wrong in 1 steps")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing.json", None),
        ("sft.json", '[{"step": 1, "loss": 2.0}]'),
        ("damaged.json", '{"log_history": [\n'),
        ("list.json", "[1, 2]"),
        (".", None),
    ],
)
def test_what_is_no_log_is_refused_in_one_sentence(
    name: str, text: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = run(tmp_path / name)
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr
