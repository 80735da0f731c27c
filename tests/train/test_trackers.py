"""Each tracker holds what `metrics.jsonl` holds, once, also after a kill; none can stop a run."""

import importlib.util
import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import FEW, run_here
from run_directory import WEIGHTS
from tracker_logs import READERS, Log
from trl import GRPOConfig

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.machine.files import read_jsonl
from lora_grpo.train import trackers
from lora_grpo.train.trackers import Trackers, check_trackers, figures_of, public_settings

STEPS = ("--save-steps", 2, "--eval-steps", 2, "--log-completions-steps", 2, "--quiet")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything that a tracker writes stays, without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def need(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: make test-trackers")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run end as by Ctrl-C, twice, after a step was sent and before it is saved."""
    send = Trackers.step

    def send_and_stop(self: Trackers, row: dict, *rest: object) -> None:
        send(self, row, *rest)
        if row["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trackers, "step", send_and_stop)


def train(home: Path, *arguments: object, steps: int = 4) -> str:
    """Train; return what was printed."""
    done = run_here("train_lora.py", *FEW, "--max-steps", steps, *STEPS, *arguments, home=home)
    assert done.returncode in (0, 130), done.stderr
    return done.stdout + done.stderr


def resume(home: Path, *arguments: object) -> str:
    done = run_here("train_lora.py", "--resume", "adapters/run", *arguments, home=home)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read(home: Path, name: str) -> Log:
    run_dir = home / "adapters/run"
    return READERS[name](run_dir, json.loads((run_dir / "trackers.json").read_text())["run"])


def expected(home: Path) -> dict[str, list[tuple[int, float]]]:
    """Every figure of `metrics.jsonl` by name, with its steps."""
    figures: dict[str, list[tuple[int, float]]] = {}
    for row in read_jsonl(home / "adapters/run/metrics.jsonl"):
        for name, value in figures_of(row, None).items():
            figures.setdefault(name, []).append((row["step"], value))
    return figures


def compare(home: Path, name: str) -> Log:
    """Compare a tracker's log with the run's files, and return it."""
    log, recorded = read(home, name), expected(home)
    prefixed = {key: values for key, values in log.figures.items() if key[:4] in ("eval", "test")}
    assert log.figures.keys() - prefixed.keys() == recorded.keys(), "no name twice, none missing"
    for key, values in recorded.items():
        assert [step for step, _ in log.figures[key]] == [step for step, _ in values], key
        if not key.startswith(
            ("seconds", "elapsed", "tokens_per", "peak")
        ):  # of a step that was made again
            found = [value for _, value in log.figures[key]]
            assert found == pytest.approx([value for _, value in values], rel=1e-6), key
    return log


@pytest.mark.parametrize("name", READERS)
def test_a_killed_run_is_continued_in_the_same_log_without_a_step_twice(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(name)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        train(home, "--report-to", name)
    assert [row["step"] for row in read_jsonl(home / "adapters/run/metrics.jsonl")] == [1, 2, 3]
    if name == "trackio":  # which writes with a delay
        from trackio.sqlite_storage import SQLiteStorage

        with sqlite3.connect(SQLiteStorage.get_project_db_path("lora-grpo")) as database:
            database.execute("DELETE FROM metrics WHERE step = 3")
    assert f"{name}: continues after step {2 if name == 'trackio' else 3}" in resume(home)
    log, slash = compare(home, name), "_" if name == "mlflow" else "/"
    assert log.runs == 1
    validated = read_jsonl(home / "adapters/run/validation.jsonl")
    accuracy = [(row["step"], pytest.approx(row["strict_accuracy"])) for row in validated]
    assert log.figures[f"eval{slash}strict_accuracy"] == accuracy
    report = json.loads((home / "adapters/run/eval.json").read_text())
    found = [(4, pytest.approx(report["adapter"]["strict_accuracy"]))]
    assert log.figures[f"test{slash}adapter_strict_accuracy"] == found
    if name != "tensorboard":
        assert sorted(log.tables) == [2, 4]
        first = read_jsonl(home / "adapters/run/completions.jsonl")[0]
        assert log.tables[2][0]["completion"] == first["completion"]
        assert log.tables[2][0]["rewards/correctness"] == first["rewards"]["correctness"]
    assert float(log.settings["learning_rate"]) == 1e-3
    assert str(home) not in json.dumps(log.settings)


def test_a_tracker_that_comes_later_gets_the_earlier_steps_and_changes_no_weight(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    need("tensorboard")
    train(home, steps=2)
    assert not (home / "adapters/run/trackers.json").exists()
    resume(home, "--max-steps", 3, "--report-to", "tensorboard")
    log = compare(home, "tensorboard")
    assert [step for step, _ in log.figures["reward"]] == [1, 2, 3]
    record = json.loads((home / "adapters/run/train_config.json").read_text())
    assert record["report_to"] == ["tensorboard"]
    alone = tmp_path_factory.mktemp("alone")
    train(alone, steps=3)
    for file in WEIGHTS:
        with_tracker, without = (place / "adapters/run" / file for place in (home, alone))
        assert with_tracker.read_bytes() == without.read_bytes()


def fail(*_: object, **more: object) -> None:
    raise ConnectionError("the server is down\nTraceback of ten lines")


def test_a_tracker_that_fails_is_one_sentence_and_the_run_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("tensorboard")
    from transformers.integrations import TensorBoardCallback

    with monkeypatch.context() as patched:
        patched.setattr(TensorBoardCallback, "on_log", fail)
        printed = train(home, "--report-to", "tensorboard", steps=2)
    assert printed.count("--report-to tensorboard failed") == 1
    assert "the server is down" in printed and "Traceback" not in printed
    assert (home / "adapters/run/eval.json").is_file()
    resume(home, "--max-steps", 3)
    assert [step for step, _ in compare(home, "tensorboard").figures["loss"]] == [1, 2, 3]


def send_a_step(home: Path, name: str) -> list[str]:
    """Send one step to a tracker; return the warnings."""
    warnings: list[str] = []
    args = GRPOConfig(output_dir=str(home), report_to="none", use_cpu=True, bf16=False)
    with Trackers(home, [name], args, {"seed": 0}, say=list, warn=warnings.append) as opened:
        opened.step({"step": 1, "loss": 0.5}, None, [])
    return warnings


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_whenever_it_fails_it_is_one_sentence(
    event: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("tensorboard")
    from transformers.integrations import TensorBoardCallback

    assert send_a_step(home, "tensorboard") == []
    monkeypatch.setattr(TensorBoardCallback, event, fail)
    (home / "trackers.json").unlink()
    (warning,) = send_a_step(home, "tensorboard")
    assert "--report-to tensorboard" in warning and "(the server is down)" in warning


def test_nobody_logged_in_is_one_sentence_and_no_question(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("wandb")
    import wandb

    wandb.teardown()  # it keeps the settings of the process
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(home / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (warning,) = send_a_step(home, "wandb")
    wandb.teardown()
    assert "wandb login" in warning and "WANDB_MODE=offline" in warning


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    lacking = SimpleNamespace(
        find_spec=lambda name: None if name == "trackio" else there(name),
    )
    monkeypatch.setattr(trackers, "importlib", SimpleNamespace(util=lacking))
    done = run_here("train_lora.py", *FEW, "--report-to", "trackio", home=home)
    assert done.returncode == 2
    assert "--report-to trackio" in done.stderr and "lora-grpo[trackio]" in done.stderr
    assert not (home / "adapters").exists()


def test_none_is_the_default_and_stands_alone() -> None:
    assert TrainConfig().report_to == ("none",)
    check_trackers(["none"])
    for names in ((), ("none", "wandb")):
        with pytest.raises(ValueError, match="--report-to"):
            TrainConfig(report_to=names)


def test_trackers_get_no_path_of_this_machine() -> None:
    record = {
        "model": "/home/me/models/mine",
        "base_model": "/home/me/models/mine",
        "dataset": "openai/gsm8k:main",
        "eval_dataset": None,
        "system_prompt_file": "/home/me/prompt.txt",
        "reward": ["/home/me/rewards.py:short=0.5", "rewards.py:long=1"],
        "adapters_dir": "/home/me/adapters",
        "system_prompt": "/no_think",
        "seed": 0,
    }
    assert public_settings(record) == {
        "model": "mine",
        "base_model": "mine",
        "dataset": "openai/gsm8k:main",
        "eval_dataset": None,
        "system_prompt_file": "prompt.txt",
        "reward": ["rewards.py:short=0.5", "rewards.py:long=1"],
        "system_prompt": "/no_think",
        "seed": 0,
    }
