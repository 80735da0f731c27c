"""Every way in which an import can end is an outcome, and the other imports are still tried."""

import os
import signal
import time
from pathlib import Path

import pytest
from doctor_machines import CRASH, write_package, write_stack

from lora_grpo.doctor.probes import run_probes

CORE = ("torch", "bitsandbytes", "trl")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of light packages that the probes find before the real ones."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return write_stack(tmp_path / "packages")


def test_what_works_says_its_facts_and_a_torch_for_cuda_is_made_to_compute(packages: Path) -> None:
    found = run_probes(CORE, 30)
    assert tuple(found) == CORE
    assert all(outcome.error is None and outcome.seconds < 30 for outcome in found.values())
    assert found["torch"].facts == {"version": "2.13.0", "cuda": None, "kernel": None}
    write_stack(packages, cuda="13.0")
    torch = run_probes(["torch"], 30)["torch"]
    assert torch.error is None
    assert torch.facts == {"version": "2.13.0", "cuda": "13.0", "kernel": "no kernel image"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (CRASH, "killed by SIGSEGV, a segmentation fault"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by SIGKILL, most likely for want of memory"),
        ("import os\nos._exit(3)", "the process ended with exit status 3"),
        ("import sys\nsys.exit('no')", "SystemExit: no"),
        (
            "raise ImportError('above\\n\\nlibcudart.so.13: not found')",
            "ImportError: libcudart.so.13: not found",
        ),
        (
            "try:\n  1 / 0\nexcept Exception as e:\n  raise ImportError('x') from e",
            "ZeroDivisionError: division by zero",
        ),
    ],
)
def test_a_broken_import_is_an_outcome(packages: Path, code: str, error: str) -> None:
    write_package(packages, "bitsandbytes", "print('noise', end='')\n" + code)
    found = run_probes(("torch", "bitsandbytes"), 30)
    assert found["bitsandbytes"].error == error and not found["bitsandbytes"].timed_out
    assert found["torch"].error is None


def test_the_package_that_fell_is_named_and_a_check_after_the_import_counts(packages: Path) -> None:
    (packages / "bitsandbytes/functional.py").write_text("def quantize_4bit(*a, **k): 1 / 0")
    write_package(packages, "peft", CRASH)
    found = run_probes(CORE, 30)
    assert found["bitsandbytes"].error == "ZeroDivisionError: division by zero"
    assert found["trl"].error.startswith("peft: killed by SIGSEGV")


def test_a_hang_ends_at_the_limit_though_a_grandchild_lives_on(packages: Path) -> None:
    pid = packages / "pid"
    write_package(
        packages,
        "torch",
        "import subprocess, time\n"
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "time.sleep(60)",
    )
    start = time.perf_counter()
    found = run_probes(["torch", "trl"], 3)
    took = time.perf_counter() - start
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert took < 20
    assert found["torch"].error == "no end after 3 s" and found["torch"].timed_out
    assert found["trl"].error is None


def test_files_of_the_current_folder_are_not_taken_for_packages(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "datasets.py").write_text("raise RuntimeError('mine')")
    (packages / "datasets/__init__.py").unlink()
    (packages / "datasets.py").write_text("")
    (packages / "datasets").rmdir()
    monkeypatch.chdir(tmp_path)
    assert run_probes(["trl"], 30)["trl"].error is None
