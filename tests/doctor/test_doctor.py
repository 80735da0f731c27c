"""The whole report: the choice, the exit status, what is hidden, and the script."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from commands import ROOT, run_script
from doctor_machines import CRASH, T4, put_nvidia_smi, write_package, write_stack
from huggingface_hub import constants

from lora_grpo.doctor.command import DoctorConfig, Report, examine, print_report, to_json
from lora_grpo.doctor.machine import Row
from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.terminal import command_line

BROKEN = Outcome(1.0, "ImportError: undefined symbol")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that refuses at once, memory enough, and no GPU unless a test puts one."""
    monkeypatch.setattr("lora_grpo.doctor.machine.available_memory", lambda: 2**34)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, with Unsloth and vLLM, and a model in the cache."""
    for name in ("unsloth", "vllm"):
        write_package(tmp_path / "packages", name)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    put_nvidia_smi(monkeypatch, tmp_path / "bin", f"echo '{T4}'")


def look(cuda: str | None = None, kernel: str | None = None, **broken: Outcome) -> Report:
    """Examine the machine with imports that all work except those given."""
    torch = Outcome(1.0, facts={"version": "2.13.0", "cuda": cuda, "kernel": kernel})
    given = {"torch": torch, **broken}
    return examine(
        DoctorConfig(), lambda names, _: {name: given.get(name, Outcome(1.0)) for name in names}
    )


def find(report: Report, section: str, name: str) -> Row:
    return next(row for row in report.rows if (row.section, row.name) == (section, name))


def show(report: Report) -> str:
    with redirect_stdout(StringIO()) as text:
        print_report(report)
    return text.getvalue()


def test_without_a_gpu_the_tiny_preset_trains() -> None:
    report = look()
    assert report.can_train and report.command == command_line("train_lora.py")
    assert (report.preset, report.choice.backend) == ("tiny", "transformers")
    assert report.choice.rollout == "generate" and "no GPU" in report.choice.why_backend
    assert find(report, "hub", "hub").status == "warning"


@pytest.mark.parametrize(
    ("broken", "backend", "rollout", "flags"),
    [
        (None, "unsloth", "vllm", ""),
        ("unsloth", "transformers", "vllm", " --backend transformers"),
        ("vllm", "unsloth", "generate", " --rollout generate"),
    ],
)
def test_with_a_gpu_what_is_installed_is_chosen_if_it_can_be_imported(
    gpu: None, broken: str | None, backend: str, rollout: str, flags: str
) -> None:
    report = look("12.6", **({broken: BROKEN} if broken else {}))
    choice = report.choice
    assert (report.preset, choice.backend, choice.rollout) == ("qwen2.5-0.5b", backend, rollout)
    assert report.can_train and report.command == command_line("train_lora.py") + flags
    why = {"unsloth": choice.why_backend, "vllm": choice.why_rollout}.get(broken, "")
    assert ("cannot be imported" in why) == bool(broken)


@pytest.mark.parametrize("name", ["torch", "bitsandbytes", "trl", "gpu"])
def test_what_a_run_needs_stops_it(gpu: None, name: str) -> None:
    report = look("13.0", "driver too old") if name == "gpu" else look("12.6", **{name: BROKEN})
    text = show(report)
    assert any({"FAIL", name} <= set(line.split()) for line in text.splitlines())
    assert f"  {name}: " in text.partition("What to do")[2]
    assert "It cannot train yet" in text and "It can train" not in text and "\x1b" not in text


def test_no_token_password_name_or_home_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setattr(constants, "ENDPOINT", "http://bob:pass@127.0.0.1:9")
    error = "ImportError: hf_verysecret /home/alice/x.so /data/alice/y.so /home/alicebob"
    report = look(bitsandbytes=Outcome(1.0, error))
    for text in (show(report), to_json(report)):
        assert "verysecret" not in text and "pass@" not in text and "/alice/" not in text
    shown = find(report, "imports", "bitsandbytes").value
    assert shown == "ImportError: [hidden] ~/x.so /data/[user]/y.so /home/alicebob"


def test_the_script_on_this_machine() -> None:
    done = run_script("doctor.py", "--json", home=ROOT)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["can_train"] else 1), "busy machines lack the memory"
    assert found["preset"] == "tiny" and found["backend"] and found["command"]
    rows = {(row["section"], row["name"]): row for row in found["rows"]}
    assert all(
        set(row) == {"section", "name", "value", "status", "advice"} for row in rows.values()
    )
    for name in ("torch", "bitsandbytes", "trl"):
        assert rows["imports", name]["value"].startswith("imports in ")


def test_the_script_outlives_a_package_that_crashes(tmp_path: Path) -> None:
    write_package(write_stack(tmp_path), "torch", CRASH)
    done = run_script("doctor.py", home=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr == ""
    assert "killed by SIGSEGV" in done.stdout and "It cannot train yet" in done.stdout
    help_text = run_script("doctor.py", "--help", home=ROOT, PYTHONPATH=str(tmp_path))
    assert help_text.returncode == 0 and "--probe-timeout" in help_text.stdout
    wrong = run_script("doctor.py", "--probe-timeout", 0, home=ROOT)
    assert wrong.returncode == 2 and "--probe-timeout must be greater than 0" in wrong.stderr
