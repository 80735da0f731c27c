"""Machines that the doctor's tests pretend: an nvidia-smi that says what it is told, packages that
import as they are told, and the outcomes of imports."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lora_grpo.doctor.probes import Outcome

T4 = "Tesla T4, 580.65.06, 7.5, 15360, 14900"
RTX3090 = "NVIDIA GeForce RTX 3090, 550.54.14, 8.6, 24576, 24000"
OLD_T4 = "Tesla T4, 535.104.05, 7.5, 15360, 14900"
NOT_SUPPORTED = 'raise RuntimeError("The NVIDIA driver on your system is too old")'
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
TORCH = """
import types
__version__ = "{version}"
version = types.SimpleNamespace(cuda={cuda!r})
cuda = types.SimpleNamespace(get_arch_list=lambda: {archs!r})
class Tensor:
    add = lambda self, other: self
    item = lambda self: 2.0
def ones(size, device=None):
    if device == "cuda":
        {cuda_fails}
    return Tensor()
"""


def put_nvidia_smi(
    patch: pytest.MonkeyPatch,
    folder: Path,
    gpu: str | None,
    heading: str = "CUDA Version: 12.2",
    apps: str = "",
    otherwise: str = "",
) -> Path:
    """Put an nvidia-smi first on PATH; it answers from what is given and notes how it was called.

    Without `gpu` it fails to describe one; `otherwise` is then its end, as shell text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = f'echo "{gpu}, [N/A]"' if gpu else "exit 6"
    listed = otherwise or f'echo "GPU 0: {(gpu or "").split(",")[0]} (UUID: GPU-1)"'
    script = folder / "nvidia-smi"
    script.write_text(
        f"""#!/bin/sh
echo "$*" >> {folder}/calls
case "$*" in
*--query-gpu=*) {described} ;;
*--query-compute-apps=*) cat <<'END'
{apps}
END
;;
*-L*) {listed} ;;
*) echo "| NVIDIA-SMI 1.2  Driver Version: 1.2  {heading} |" ;;
esac
"""
    )
    script.chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder / "calls"


def write_package(folder: Path, name: str, code: str = "") -> None:
    """Write a package of one file."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(code)


def write_stack(folder: Path, cuda: str | None = None, cuda_fails: str = "pass") -> Path:
    """Write packages that pass every probe of a run: light ones, instead of the real."""
    torch = TORCH.format(version="2.13.0", cuda=cuda, archs=[], cuda_fails=cuda_fails)
    write_package(folder, "torch", torch)
    write_package(folder, "bitsandbytes")
    (folder / "bitsandbytes/functional.py").write_text("def quantize_4bit(*a, **k): pass\n")
    for name in ("transformers", "datasets", "peft"):
        write_package(folder, name)
    write_package(folder, "trl", "GRPOConfig = GRPOTrainer = None\n")
    return folder


def torch_outcome(
    cuda: str | None = None, kernel: str | None = None, archs: Sequence[str] = ()
) -> Outcome:
    facts = {"version": "2.13.0+test", "cuda": cuda, "kernel": kernel, "archs": list(archs)}
    return Outcome(1.0, facts=facts)


def outcomes(**changed: Outcome) -> Callable[[Sequence[str], float], dict[str, Outcome]]:
    """Return a stand-in for `run_probes`: every import works but those that are given."""
    given = {"torch": torch_outcome(), **changed}
    return lambda names, seconds: {name: given.get(name, Outcome(1.0)) for name in names}
