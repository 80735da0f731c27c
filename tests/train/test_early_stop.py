"""A run that ends early is a finished one, and can be prolonged as if it had not ended."""

import json
import shutil
from pathlib import Path

import pytest
from killed_runs import SMALL
from run_directory import contents, read_rows

from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.policy.checkpoints import list_checkpoints
from lora_grpo.train import command as job
from lora_grpo.train.recorder import reason_to_end

LONG = {"max_completion_length": 40}  # for answers that are not all cut off
REACHED = {"stop_at_accuracy": 0.01}  # by the first validation of the embedded model


def train(run_dir: Path, **settings) -> dict:
    """Run the command with these settings, or go on with a run that is there; return eval.json."""
    if run_dir.exists():
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        config, why = parse_train_config(["--resume", str(run_dir), "--quiet", *flags])
    else:
        where = {"adapters_dir": run_dir.parent, "run_name": run_dir.name}
        config, why = TrainConfig(**{**SMALL, "max_steps": 4, **where, **settings}), "a test"
    assert job.run(config, why) == 0
    return json.loads((run_dir / "eval.json").read_text())


def test_accuracy_ends_a_run_which_prolonged_equals_one_that_never_ended(
    tmp_path: Path, capsys
) -> None:
    report = train(tmp_path / "parts/run", **LONG, **REACHED)
    assert report["steps"] == report["best_step"] == 2 and "adapter" in report
    assert "step 2 of 2" in (tmp_path / "parts/run/README.md").read_text()
    ended = contents(tmp_path / "parts/run")
    capsys.readouterr()
    train(tmp_path / "parts/run")
    told = " ".join(capsys.readouterr().out.split())
    assert "ended after step 2 of 4" in told and "--stop-at-accuracy None" in told
    assert contents(tmp_path / "parts/run") == ended
    report = train(tmp_path / "parts/run", stop_at_accuracy=None)
    assert report["steps"] == 4 and "ended_early" not in report
    train(tmp_path / "whole/run", **LONG)
    assert contents(tmp_path / "parts/run") == contents(tmp_path / "whole/run")


def test_minutes_end_a_run_at_a_whole_batch_also_after_a_kill(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"num_iterations": 2, "max_completion_length": 8}
    report = train(run, **settings, max_minutes=1e-6)
    assert report["steps"] == 2 and "--max-minutes" in report["ended_early"]
    assert [row["step"] for row in read_rows(run / "validation.jsonl")] == [2]
    for name in ("eval.json", "eval_items.jsonl", "README.md", "last"):  # killed while evaluating
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = train(run)
    assert again == report and [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    assert train(run, max_minutes=60)["steps"] == 4


def test_a_run_ends_for_a_reason_only() -> None:
    config = TrainConfig(max_minutes=2, stop_at_accuracy=0.5)
    low, high = ([{"strict_accuracy": value}] for value in (0.49, 0.5))
    assert reason_to_end(config, 119, low) is None
    assert "--max-minutes 2 " in reason_to_end(config, 120, low)
    assert "50.0%" in reason_to_end(config, 0, high)
    assert reason_to_end(TrainConfig(), 1e9, high) is None


@pytest.mark.parametrize(
    "settings",
    [{"max_minutes": 0}, {"stop_at_accuracy": 50}, {**REACHED, "num_validation_items": 0}],
)
def test_limits_that_cannot_be_are_refused(settings: dict) -> None:
    name = next(iter(settings)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--{name}.*{next(iter(settings.values()))}"):
        TrainConfig(**settings)
