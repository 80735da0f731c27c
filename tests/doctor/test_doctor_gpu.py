"""The GPU rows, from an nvidia-smi that pretends a card and from what torch says of itself."""

from pathlib import Path

import pytest
from doctor_machines import OLD_T4, RTX3090, T4, put_nvidia_smi, torch_outcome

from lora_grpo.doctor.gpu import (
    driver_cuda,
    find_holders,
    gpu_rows,
    has_nvidia_card,
    no_gpu_row,
    runs_on,
)
from lora_grpo.doctor.machine import Row
from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.hardware import find_gpu

RUNS = torch_outcome(cuda="12.6")
TOO_OLD = torch_outcome(cuda="13.0", kernel="The NVIDIA driver on your system is too old")


def look(torch: Outcome = RUNS) -> dict[str, Row]:
    """Rows by name, as the doctor would gather them from the nvidia-smi on PATH."""
    rows = gpu_rows(find_gpu(), find_holders(), driver_cuda(), torch)
    return {row.name: row for row in rows}


def test_a_t4_and_an_ampere_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path / "t4", T4)
    t4 = look()
    assert t4["gpu"].value == "Tesla T4, 15.0 GiB" and t4["driver"].value == "580.65.06"
    assert t4["compute capability"].value == "7.5"
    assert t4["bfloat16"].value == "no, it computes in float16"
    assert t4["memory"].value == "14.6 GiB free of 15.0 GiB"
    assert t4["held by"].value == "nobody"
    assert t4["cuda"].value == "driver: up to 12.2; torch was built for 12.6 and runs"
    assert all(row.status == "ok" and row.advice is None for row in t4.values())
    put_nvidia_smi(monkeypatch, tmp_path / "ampere", RTX3090, "CUDA UMD Version: 13.3")
    ampere = look()
    assert ampere["bfloat16"].value == "yes" and ampere["compute capability"].value == "8.6"
    assert ampere["cuda"].value.startswith("driver: up to 13.3;")


def test_a_driver_too_old_for_torchs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, OLD_T4)
    cuda = look(TOO_OLD)["cuda"]
    assert cuda.status == "problem"
    assert "built for 13.0, which needs driver 580 or newer, got 535.104.05" in cuda.value
    assert "either update the driver" in cuda.advice and "nvidia-driver-580" in cuda.advice
    assert "or install the build of torch for CUDA 12" in cuda.advice
    # A forward-compatibility package lets an old driver run it all the same.
    assert look(torch_outcome(cuda="13.0"))["cuda"].status == "ok"
    put_nvidia_smi(monkeypatch, tmp_path / "older", OLD_T4.replace("535", "470"))
    cuda = look(TOO_OLD)["cuda"]
    assert cuda.status == "problem" and "either" not in cuda.advice


def test_a_new_driver_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, T4)
    cuda = look(torch_outcome(cuda="13.0", kernel="CUDA unknown error"))["cuda"]
    assert cuda.status == "problem" and "cannot compute: CUDA unknown error" in cuda.value
    assert "reboot" in cuda.advice and "update the driver" not in cuda.advice
    full = look(torch_outcome(cuda="13.0", kernel="CUDA out of memory. Tried"))["cuda"]
    assert full.status == "problem" and full.advice == "free memory on the GPU"


@pytest.mark.parametrize(
    ("driver", "advice"),
    [
        ("580.65.06", "pip uninstall -y torch && pip install -r requirements.txt"),
        ("535.104.05", "install the build of torch for CUDA 12"),
        ("470.1", "update the driver"),
    ],
)
def test_a_torch_for_the_cpu_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, advice: str
) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, T4.replace("580.65.06", driver))
    cuda = look(torch_outcome())["cuda"]
    assert cuda.status == "problem" and cuda.advice.startswith(advice)
    assert "torch 2.13.0+test was built for the CPU alone" in cuda.value


def test_a_torch_that_cannot_be_imported_says_nothing_of_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, T4)
    rows = look(Outcome(1.0, "ImportError: no"))
    assert "torch cannot say" in rows["cuda"].value
    assert all(row.status == "ok" for row in rows.values())


def test_a_card_that_torch_has_no_code_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, "GTX 1080, 580.1, 6.1, 8192, 8000")
    rows = look(torch_outcome(cuda="13.0", kernel="no kernel image", archs=["sm_75", "sm_90"]))
    assert rows["compute capability"].status == "problem"
    assert rows["compute capability"].value == "6.1; torch has code for sm_75 sm_90 only"
    assert rows["cuda"].status == "ok"  # one problem, one row


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["sm_80"], 8.6, True),
        (["sm_86"], 8.0, False),
        (["sm_75", "sm_90"], 8.6, False),
        (["compute_80"], 12.0, True),
        (["compute_90"], 8.6, False),
        (["sm_90a"], 9.0, False),
        (["sm_100", "sm_120"], 12.0, True),
        (["sm_120"], 10.0, False),
        ([], 7.5, True),
    ],
)
def test_which_machine_code_runs_where(archs: list[str], capability: float, expected: bool) -> None:
    assert runs_on(archs, capability) is expected


def test_memory_that_others_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apps = "4242, /home/alice/venv/bin/python, 9312\n4343, [Not Found], [N/A]"
    busy = T4.replace("14900", "3000")
    calls = put_nvidia_smi(monkeypatch, tmp_path, busy, apps=apps)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    rows = look()
    assert rows["held by"].value == "python (pid 4242, 9.1 GiB), [Not Found] (pid 4343, unknown)"
    assert rows["memory"].status == "warning" and "kill 4242 4343" in rows["memory"].advice
    asked = [line for line in calls.read_text().splitlines() if "compute-apps" in line]
    assert asked and all(line.startswith("-i 1 ") for line in asked)


def test_memory_that_nobody_owns_up_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, T4.replace("14900", "3000"))
    rows = look()
    assert rows["held by"].value.startswith("12.1 GiB by what the driver does not name")
    assert "nvidia-smi lists them" in rows["memory"].advice


def test_a_small_card_gets_a_smaller_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, "GTX 1650, 580.1, 7.5, 4096, 4000")
    memory = look()["memory"]
    assert memory.status == "warning" and "--preset smollm2-135m" in memory.advice


def test_why_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    card = tmp_path / "pci" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x8086\n")
    (card / "class").write_text("0x030000\n")
    assert not has_nvidia_card(tmp_path / "pci")
    assert no_gpu_row(tmp_path / "pci") == Row("gpu", "gpu", "none: it trains on the CPU")
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x040300\n")  # the card's own sound device
    assert not has_nvidia_card(tmp_path / "pci")
    (card / "class").write_text("0x030200\n")
    without_driver = no_gpu_row(tmp_path / "pci")
    assert without_driver.status == "warning" and "install" in without_driver.advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    hidden = no_gpu_row(tmp_path / "pci")
    assert hidden.status == "ok" and hidden.value == "hidden: CUDA_VISIBLE_DEVICES is -1"


def test_an_nvidia_smi_that_cannot_describe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mismatch = "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    put_nvidia_smi(monkeypatch, tmp_path / "mismatch", None, otherwise=mismatch)
    row = look()["gpu"]
    assert row.status == "warning" and "reboot" in row.advice
    assert row.value.endswith("Failed to initialize NVML: Driver/library version mismatch")
    ancient = "echo 'GPU 0: Tesla K80'"
    put_nvidia_smi(monkeypatch, tmp_path / "ancient", None, otherwise=ancient)
    row = look()["gpu"]
    assert row.status == "warning" and "too old to describe GPU 0: Tesla K80" in row.value
    assert "update the driver to 580" in row.advice
