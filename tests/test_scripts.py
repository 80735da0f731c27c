"""The scripts as a user types them: one small run from training to merged weights, and mistakes."""

import json
from pathlib import Path

import pytest
from commands import FEW, run_here, run_script

SHORT = "def short(completions, **columns):\n    return [-len(text) / 9 for text in completions]\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one tiny run was trained, with a reward of the user's own."""
    home = tmp_path_factory.mktemp("home")
    (home / "mine.py").write_text(SHORT)
    done = run_script("train_lora.py", *FEW, "--reward", "mine.py:short=0.5", home=home)
    assert done.returncode == 0, done.stderr
    assert "strict accuracy" in done.stdout and "merge_adapter.py adapters/run" in done.stdout
    return home


def test_own_reward_reaches_the_metrics(home: Path) -> None:
    lines = (home / "adapters/run/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["rewards"]["short"] < 0 for line in lines)


def test_evaluate_repeats_the_runs_own_figures(home: Path) -> None:
    again = ("evaluate.py", "adapters/run", "--output", "again.json")
    done = run_here(*again, home=home)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((home / "adapters/run/eval.json").read_text())
    del recorded["best_step"], recorded["steps"]
    assert json.loads((home / "again.json").read_text()) == recorded
    once_more = run_here(*again, home=home)
    assert once_more.returncode == 2 and "again.json exists already" in once_more.stderr


def test_merged_weights_load_alone_and_answer(home: Path) -> None:
    done = run_here("merge_adapter.py", "adapters/run", home=home)
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "merged/run")
    assert not getattr(model, "is_quantized", False)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    few = ("--model", "merged/run", "--dataset", "arithmetic", "--num-items", 4)
    answered = run_here("evaluate.py", *few, home=home)
    assert answered.returncode == 0, answered.stderr


def test_a_run_that_is_there_is_never_overwritten(home: Path) -> None:
    again = run_here("train_lora.py", *FEW, home=home)
    assert again.returncode == 2
    assert "adapters/run exists already and is never overwritten" in again.stderr


def test_dry_run_and_preview_load_and_write_nothing(tmp_path: Path) -> None:
    planned = run_here("train_lora.py", *FEW, "--dry-run", home=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "num_generations = 4" in planned.stdout
    shown = run_here("train_lora.py", *FEW, "--preview", home=tmp_path)
    assert shown.stdout.count("<|im_start|>assistant") == 3
    assert shown.stdout.count(", gold answer '") == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num-generation", "8"], "Perhaps you meant"),
        (["--num-generations", "1"], "a group of one has no advantage"),
        (["--dataset", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--resume", "adapters/none"], "holds no train_config.json"),
        (["--preset", "tiny", "--target-modules", "q_prj"], "no such linear layer"),
        (["--preset", "tiny", "--reward", "x.py:f"], "x.py"),
        (["--preset", "qwen2.5-0.5b"], "--preset qwen2.5-0.5b needs an NVIDIA GPU"),
        (["--preset", "tiny", "--backend", "unsloth"], "--backend unsloth needs an NVIDIA GPU"),
        (["--preset", "tiny", "--gpu-memory", "8"], "--gpu-memory 8: no GPU was found"),
    ],
)
def test_a_mistake_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_here("train_lora.py", *arguments, home=tmp_path)
    assert done.returncode == 2
    assert sentence in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_exploding_training_says_what_to_change(tmp_path: Path) -> None:
    done = run_here("train_lora.py", *FEW, "--learning-rate", "1e30", home=tmp_path)
    assert done.returncode == 1
    assert "lower --learning-rate" in done.stderr and done.stderr.count("\n") == 1
    assert list((tmp_path / "adapters/run").glob("non_finite_step_*.jsonl"))
