"""`scripts/plan_memory.py` as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_grpo.memory.command import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_gpu_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("size", [6, 24])
def test_the_main_preset_fits_every_card(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["--preset", "qwen2.5-0.5b", "--gpu-memory", str(size), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["fits"]
    assert found["peak_bytes"] <= found["budget_bytes"] == size * 2**30
    assert found["device"] == "cuda"
    assert (found["backend"], found["rollout"]) == ("unsloth", "vllm")
    assert found["settings"]["vllm_gpu_memory_utilization"] < 1
    at_peak = ("always", found["peak_phase"])
    assert sum(t["bytes"] for t in found["terms"] if t["phase"] in at_peak) == found["peak_bytes"]
    assert any("as published" in note or "config.json" in note for note in found["notes"])


def test_the_table_has_every_term_that_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--preset", "qwen2.5-3b", "--gpu-memory", "8", "--backend", "transformers"]) == 0
    printed = capsys.readouterr().out
    promised = (
        "linear layers|embeddings|LoRA weights|LoRA gradients|optimiser|vLLM's weights|"
        "vLLM's KV cache|CUDA context|CUDA graphs|activations|log-probs in tiles|1 GB = 2**30 bytes"
    )
    assert [name for name in promised.split("|") if name not in printed] == []
    assert "fits: peak" in printed


def test_nothing_fits_is_status_1_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--preset", "qwen2.5-3b", "--gpu-memory", "2"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "a card with" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "owner/unknown", "--gpu-memory", "8"], "--model owner/unknown"),
        (["--preset", "qwen2.5-3b", "--target-modules", "fc1"], "--target-modules fc1"),
        (["--preset", "qwen2.5-3b", "--measure", "--gpu-memory", "8"], "--measure reads"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises((OSError, ValueError), match=message):
        run(arguments)


def test_a_plan_for_a_card_never_imports_torch() -> None:
    code = """
import sys
from lora_grpo.memory.command import run
status = run(["--json", "--preset", "qwen2.5-0.5b", "--gpu-memory", "8"])
sys.exit("torch" in sys.modules and 9 or status)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the plan knows glibc's allocator")
def test_the_embedded_model_holds_what_was_predicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At temperature 8 completions run to their limit, and no group is without a signal."""
    varied = ROOT / "tests" / "gpu" / "varied_reward.py"
    flags = ["--preset", "tiny", "--temperature", "8", "--reward", f"{varied}:varied=1"]
    flags += ["--measure", "--json"]
    assert run(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("the longest prompt of the data has" in note for note in found["notes"])
    update = sum(t["bytes"] for t in found["terms"] if t["phase"] == "update, backward")
    assert update > 0.3 * found["measured_bytes"], "or the libraries alone would do"
    assert found["peak_bytes"] == pytest.approx(found["measured_bytes"], rel=0.15)
