"""Machines that tests pretend: an nvidia-smi that says what it is told, and packages that import as
they are told."""

from pathlib import Path

import pytest

T4 = "Tesla T4, 580.65.06, 7.5, 15360, 14900, [N/A]"
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
TORCH = """
import types
__version__ = "2.13.0"
version = types.SimpleNamespace(cuda={cuda!r})
def ones(size, device=None):
    if device == "cuda":
        raise RuntimeError("no kernel image\\nmore")
"""


def put_nvidia_smi(patch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Make an nvidia-smi that runs this shell script the only command on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    patch.setenv("PATH", str(folder))
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def write_package(folder: Path, name: str, code: str = "") -> None:
    """Write a package of one file."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(code)


def write_stack(folder: Path, cuda: str | None = None) -> Path:
    """Write packages that pass every probe of a run: light ones, instead of the real. A torch that
    is built for CUDA cannot compute."""
    write_package(folder, "torch", TORCH.format(cuda=cuda))
    write_package(folder, "bitsandbytes")
    (folder / "bitsandbytes/functional.py").write_text("def quantize_4bit(*a, **k): pass\n")
    for name in ("transformers", "datasets", "peft"):
        write_package(folder, name)
    write_package(folder, "trl", "GRPOConfig = GRPOTrainer = None\n")
    return folder
