"""The scripts as a user types them: one small run from training to merged weights, and mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEW = ("--preset", "tiny", "--max-steps", 2, "--num-generations", 4)
FEW += ("--per-device-train-batch-size", 8, "--num-eval-items", 8)
FEW += ("--num-validation-items", 8, "--max-completion-length", 48)


def run(script: str, *arguments: object, home: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
        cwd=home,
        env={**os.environ, "PATH": "/usr/bin:/bin", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one tiny run was trained."""
    home = tmp_path_factory.mktemp("home")
    done = run("train_lora.py", *FEW, "--run-name", "run", home=home)
    assert done.returncode == 0, done.stderr
    assert "strict accuracy" in done.stdout and "merge_adapter.py adapters/run" in done.stdout
    return home


def test_evaluate_repeats_the_runs_own_figures(home: Path) -> None:
    done = run("evaluate.py", "adapters/run", "--output", "again.json", home=home)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((home / "adapters/run/eval.json").read_text())
    del recorded["best_step"], recorded["steps"]
    assert json.loads((home / "again.json").read_text()) == recorded
    again = run("evaluate.py", "adapters/run", "--output", "again.json", home=home)
    assert again.returncode == 2 and "again.json exists already" in again.stderr


def test_merged_weights_load_alone_and_answer(home: Path) -> None:
    done = run("merge_adapter.py", "adapters/run", home=home)
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "merged/run")
    assert not getattr(model, "is_quantized", False)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    answered = run(
        "evaluate.py",
        "--model",
        "merged/run",
        "--dataset",
        "arithmetic",
        "--num-items",
        4,
        home=home,
    )
    assert answered.returncode == 0, answered.stderr


def test_a_second_run_takes_another_name_and_a_named_one_is_never_overwritten(home: Path) -> None:
    again = run("train_lora.py", *FEW, "--run-name", "run", home=home)
    assert again.returncode == 2
    assert "adapters/run exists already and is never overwritten" in again.stderr
    assert "Traceback" not in again.stderr
    planned = run(
        "train_lora.py", *FEW, "--adapters-dir", home / "adapters", "--dry-run", home=home
    )
    assert f"{home}/adapters/tiny" in planned.stdout.replace("\n", "")


def test_dry_run_and_preview_load_and_write_nothing(tmp_path: Path) -> None:
    planned = run("train_lora.py", *FEW, "--dry-run", home=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "num_generations = 4" in planned.stdout
    shown = run("train_lora.py", *FEW, "--preview", home=tmp_path)
    assert shown.stdout.count("<|im_start|>assistant") == 3
    assert shown.stdout.count("gold answer") == 3
    assert list(tmp_path.iterdir()) == []


def test_own_reward_reaches_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-len(text) / 9 for text in completions]\n"
    )
    done = run(
        "train_lora.py", *FEW, "--run-name", "own", "--reward", "mine.py:short=0.5", home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "adapters/own/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["rewards"]["short"] < 0 for line in lines)


MISTAKES = {
    "typo": (["--num-generation", "8"], "Perhaps you meant"),
    "group of one": (["--num-generations", "1"], "a group of one has no advantage"),
    "no such data": (["--dataset", "nothing.jsonl"], "nothing.jsonl does not exist"),
    "no such adapter": (["--resume", "adapters/none"], "holds no train_config.json"),
    "no such layer": (["--preset", "tiny", "--target-modules", "q_prj"], "no such linear layer"),
    "no such reward": (["--preset", "tiny", "--reward", "x.py:f"], "x.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence(tmp_path: Path, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    done = run("train_lora.py", *arguments, home=tmp_path)
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == 2
    assert sentence in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_exploding_training_says_what_to_change(tmp_path: Path) -> None:
    done = run("train_lora.py", *FEW, "--learning-rate", "1e30", "--run-name", "run", home=tmp_path)
    assert done.returncode == 1
    assert "lower --learning-rate" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "adapters/run").glob("non_finite_step_*.jsonl"))
