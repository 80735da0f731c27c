"""The choice of backend and rollout: what it comes to, why, and what is refused."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from doctor_machines import T4, put_nvidia_smi

from lora_grpo.machine.backend import Choice, check_4bit, choose_backend, claim, installed
from lora_grpo.machine.hardware import GPU, find_gpu

AMPERE = GPU("NVIDIA GeForce RTX 3060", "580.65", 8.6, 12 * 2**30, 11 * 2**30)


def having(*packages: str) -> Callable[[str], bool]:
    return lambda package: package in packages


@pytest.mark.parametrize(
    ("gpu", "packages", "expected"),
    [
        (None, (), ("transformers", "generate", "no GPU", "no GPU")),
        (None, ("vllm", "unsloth"), ("transformers", "generate", "no GPU", "no GPU")),
        (AMPERE, (), ("transformers", "generate", "unsloth is not", "vllm is not installed")),
        (AMPERE, ("vllm",), ("transformers", "vllm", "unsloth is not", "a GPU, and vllm")),
        (AMPERE, ("unsloth",), ("unsloth", "generate", "a GPU, and unsloth", "vllm is not")),
        (AMPERE, ("unsloth", "vllm"), ("unsloth", "vllm", "a GPU, and unsloth", "a GPU, and vllm")),
    ],
)
def test_auto_takes_the_fastest_that_works(gpu, packages, expected) -> None:
    choice = choose_backend("auto", "auto", gpu, having(*packages))
    assert (choice.backend, choice.rollout) == expected[:2]
    assert choice.why_backend.startswith(expected[2]) and choice.why_rollout.startswith(expected[3])


def test_what_is_asked_for_is_taken() -> None:
    both = having("unsloth", "vllm")
    choice = choose_backend("transformers", "generate", AMPERE, both)
    assert choice == Choice("transformers", "generate", "asked for", "asked for")
    assert choose_backend("transformers", "vllm", None, both).rollout == "vllm"


@pytest.mark.parametrize(
    ("backend", "rollout", "gpu", "message"),
    [
        ("unsloth", "auto", None, "--backend unsloth needs an NVIDIA GPU.*--backend transformers"),
        ("unsloth", "auto", AMPERE, "unsloth is not installed: pip install -r requirements.txt"),
        ("auto", "vllm", AMPERE, "vllm is not installed: pip install -r requirements.txt"),
        ("auto", "vllm", None, "vllm is not installed: make test-vllm .*--rollout generate"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_install(backend, rollout, gpu, message) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(backend, rollout, gpu, having())


def test_a_folder_of_a_packages_name_is_not_the_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a_folder_only").mkdir()
    (tmp_path / "a_module_too.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("a_folder_only") and not installed("nothing_at_all")
    assert installed("a_module_too")


@pytest.mark.parametrize(
    ("files", "gpu", "load_in_4bit", "refused"),
    [
        ((), AMPERE, True, True),
        ((), AMPERE, False, False),
        ((), None, True, False),
        (("vllm_bnb_plugin.py",), AMPERE, True, False),
        (("vllm/model_executor/layers/quantization/bitsandbytes.py",), AMPERE, True, False),
    ],
)
def test_a_vllm_that_cannot_read_4_bit_is_refused(
    tmp_path: Path, monkeypatch, files, gpu, load_in_4bit: bool, refused: bool
) -> None:
    for name in ("vllm/__init__.py", *files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    choice = Choice("transformers", "vllm", "", "")
    if not refused:
        check_4bit(choice, gpu, load_in_4bit)
        return
    with pytest.raises(ValueError, match="vllm-bnb-plugin, which is not installed"):
        check_4bit(choice, gpu, load_in_4bit)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment variables, of which changes do not outlive the test."""
    kept = {name: value for name, value in os.environ.items() if "VLLM" not in name}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_unsloth_is_imported_before_trl_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    with pytest.raises(RuntimeError, match="unsloth must be imported before trl"):
        claim(Choice("unsloth", "vllm", "", ""))
    monkeypatch.delitem(sys.modules, "trl")
    (tmp_path / "unsloth.py").write_text("import os; seen = dict(os.environ)")
    monkeypatch.syspath_prepend(tmp_path)
    claim(Choice("unsloth", "vllm", "", ""))
    assert sys.modules.pop("unsloth").seen["UNSLOTH_VLLM_STANDBY"] == "1"
    (tmp_path / "unsloth.py").write_text("raise ImportError('no libcuda')")
    with pytest.raises(ValueError, match=r"--backend unsloth: .*\(no libcuda\).*doctor.py"):
        claim(Choice("unsloth", "generate", "", ""))


def test_the_engine_lives_in_this_process_and_reports_to_nobody(
    environment: dict[str, str],
) -> None:
    environment["VLLM_LOGGING_LEVEL"] = "DEBUG"
    claim(Choice("transformers", "vllm", "", ""))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG", "what the user set stays"


def test_the_gpu_is_what_the_driver_says(tmp_path: Path, monkeypatch) -> None:
    put_nvidia_smi(monkeypatch, tmp_path, f"echo '{T4}'")
    gpu = find_gpu()
    assert gpu == GPU("Tesla T4", "580.65.06", 7.5, 15360 * 2**20, 14900 * 2**20)
    assert not gpu.has_bfloat16 and AMPERE.has_bfloat16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpu() is None


SLICE = ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "CUDA 12.8", 8.0, 4_990 * 2**20, 4_900 * 2**20]


@pytest.mark.parametrize(
    "driver",
    [
        "echo 'NVIDIA A100-SXM4-40GB, 570.1, 8.0, 40960, 40000, Enabled'",
        "echo 'No devices were found'; exit 6",
        "echo 'Unable to determine the device handle'",
    ],
)
def test_where_the_driver_does_not_know_torch_is_asked(
    driver: str, tmp_path: Path, monkeypatch
) -> None:
    """A card in MIG slices, a tool that finds nothing, one that says something else."""
    torch = tmp_path / "python"
    torch.write_text(f"#!/bin/sh\necho '{json.dumps(SLICE)}'\n")
    torch.chmod(0o755)
    put_nvidia_smi(monkeypatch, tmp_path, driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{driver[:12]}")
    monkeypatch.setattr("lora_grpo.machine.hardware.sys.executable", str(torch))
    assert find_gpu() == GPU(*SLICE)
