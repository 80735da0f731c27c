"""SmolLM2-135M on the real GSM8K, as a user runs it: trained where most groups are dead, killed and
resumed, merged with its proof, exported and run in llama.cpp."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_directory import contents, read_rows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="a real model takes minutes; make test-llamacpp runs it",
)
ROOT = Path(__file__).parents[2]
REWARD = ROOT / "tests/gpu/varied_reward.py"
STEPS = 3
SHORT = ("--preset", "smollm2-135m", "--no-load-in-4bit", "--max-prompt-length", 256)
SHORT += ("--num-generations", 4, "--per-device-train-batch-size", 8)
SHORT += ("--gradient-accumulation-steps", 1, "--max-completion-length", 24)
SHORT += ("--num-eval-items", 4, "--num-validation-items", 4, "--eval-steps", 2)
SHORT += ("--save-steps", 1, "--log-completions-steps", 1)


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]


def run(script: str, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(command(script, *arguments), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(smollm2: Path, gsm8k: Path) -> tuple[object, ...]:
    flags = ("--model", smollm2, "--dataset", gsm8k / "train.jsonl")
    return (*flags, "--eval-dataset", gsm8k / "test.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def trained(home: Path, data: tuple[object, ...]) -> Path:
    """A run whose groups all have a signal, from a reward that is hardly ever the same twice."""
    flags = (*SHORT, *data, "--reward-set", "none", "--reward", f"{REWARD}:varied")
    run("train_lora.py", *flags, "--max-steps", STEPS, "--run-name", "whole", cwd=home)
    return home / "adapters/whole"


def test_steps_without_a_signal_are_steps(home: Path, data: tuple[object, ...]) -> None:
    """At 24 tokens nothing reaches the answer tags, so that the real rewards pay all alike."""
    flags = (*SHORT, *data, "--max-steps", 2, "--run-name", "dead")
    print(run("train_lora.py", *flags, cwd=home))
    rows = read_rows(home / "adapters/dead/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["frac_reward_zero_std"] == row["clipped_ratio"] == 1.0
        assert row["grad_norm"] == 0.0 and row["entropy"] is None and row["loss"] is not None
    assert (home / "adapters/dead/adapter_model.safetensors").is_file()


def test_a_kill_changes_nothing(home: Path, data: tuple[object, ...], trained: Path) -> None:
    flags = (*SHORT, *data, "--reward-set", "none", "--reward", f"{REWARD}:varied")
    flags += ("--max-steps", STEPS, "--run-name", "killed")
    killed = home / "adapters/killed"
    process = subprocess.Popen(
        command("train_lora.py", *flags), cwd=home, stdout=subprocess.DEVNULL, env=os.environ
    )
    while not (killed / "checkpoint-2").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("train_lora.py", "--resume", killed, cwd=home)
    expected, found = contents(trained), contents(killed)
    for name in expected.keys() - {"card"}:  # the card names its run
        assert found[name] == expected[name], name
    assert {row["frac_reward_zero_std"] for row in expected["metrics.jsonl"]} == {0.0}
    assert all(row["grad_norm"] > 0 for row in expected["metrics.jsonl"])


def test_the_merged_model_runs_in_llamacpp(home: Path, trained: Path) -> None:
    """The merge proves itself; then llama.cpp's logits are those of the merged model."""
    print(run("merge_adapter.py", trained, "--output-dir", home / "merged", cwd=home))
    assert json.loads((home / "merged/merge_report.json").read_text())["passed"]
    arguments = ("--format", "gguf", "--quant", "q8_0", "--output-dir", home / "out")
    print(run("export_model.py", home / "merged", *arguments, cwd=home))
    report = json.loads((home / "out/export_report.json").read_text())
    checks = {check["name"]: check["passed"] for check in report["formats"]["gguf"]["checks"]}
    assert any("llamacpp_logits" in name for name in checks)
    assert all(checks.values())
