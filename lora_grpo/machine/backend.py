"""Which backend loads and trains the model and which engine samples: the choice, its reason, and
what must happen before TRL is imported.

Nothing heavy is imported until `claim` is told to.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lora_grpo.machine.hardware import GPU
from lora_grpo.machine.terminal import command_line, has_scripts

BNB_PLUGIN = "vllm_bnb_plugin"
INSTALL = (
    "pip install -r requirements.txt"
    if has_scripts()
    else "pip install unsloth vllm vllm-bnb-plugin"
)
# One process: the engine shares the GPU with the update, and a crash leaves nothing behind.
VLLM_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Quiet, no reports to its makers, and on a CPU no thread bound to a core that the update needs too.
VLLM_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # The memory plan counts CUDA graphs beside vLLM's share of the card, not inside it.
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Choice:
    """A backend and a rollout that can work on this machine, and why these."""

    backend: str
    rollout: str
    why_backend: str
    why_rollout: str


def installed(package: str) -> bool:
    """Return whether a package, not a mere folder of its name, can be found; it is not imported."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def choose_backend(
    backend: str, rollout: str, gpu: GPU | None, has: Callable[[str], bool] = installed
) -> Choice:
    """Return what `--backend` and `--rollout` come to on this machine.

    Raises:
        ValueError: what was asked for cannot work here; the message says what to install.
    """
    why_backend = why_rollout = "asked for"
    if backend == "unsloth" and gpu is None:
        raise ValueError(
            "--backend unsloth needs an NVIDIA GPU, and none was found: use --backend "
            "transformers, which trains the same adapter on a CPU"
        )
    if backend == "unsloth" and not has("unsloth"):
        raise ValueError(
            f"--backend unsloth: the package unsloth is not installed: {INSTALL}, or use "
            "--backend transformers"
        )
    if rollout == "vllm" and not has("vllm"):
        install = INSTALL if gpu else "make test-vllm sets up its CPU build in .venv-vllm"
        raise ValueError(
            f"--rollout vllm: the package vllm is not installed: {install}, or use --rollout "
            "generate"
        )
    if backend == "auto" and gpu is not None and has("unsloth"):
        backend, why_backend = "unsloth", "a GPU, and unsloth is installed"
    elif backend == "auto":
        backend = "transformers"
        why_backend = "unsloth is not installed" if gpu else "no GPU"
    if rollout == "auto" and gpu is not None and has("vllm"):
        rollout, why_rollout = "vllm", "a GPU, and vllm is installed"
    elif rollout == "auto":
        rollout = "generate"
        why_rollout = (
            "vllm is not installed" if gpu else "no GPU; --rollout vllm uses vLLM's CPU build"
        )
    return Choice(backend, rollout, why_backend, why_rollout)


def check_4bit(choice: Choice, gpu: GPU | None, load_in_4bit: bool) -> None:
    """Refuse a vLLM that cannot read 4-bit weights on a GPU; on a CPU it is handed whole ones.

    Raises:
        ValueError: the reader is missing; the message says what to install.
    """
    if choice.rollout != "vllm" or gpu is None or not load_in_4bit or installed(BNB_PLUGIN):
        return
    layers = Path(find_spec("vllm").origin).parent / "model_executor/layers/quantization"
    if not (layers / "bitsandbytes.py").is_file():
        raise ValueError(
            "--rollout vllm: this vLLM reads 4-bit weights only with the package vllm-bnb-plugin, "
            f"which is not installed: {INSTALL}, or use --rollout generate or --no-load-in-4bit"
        )


def claim(choice: Choice) -> None:
    """Prepare the process for a choice, before anything imports torch.

    Unsloth patches TRL, transformers and PEFT while it is imported, so it must come first.

    Raises:
        RuntimeError: TRL is here already, unpatched.
        ValueError: unsloth is installed but cannot be imported.
    """
    if choice.rollout == "vllm":
        os.environ |= VLLM_ENVIRONMENT | {
            name: value for name, value in VLLM_DEFAULTS.items() if name not in os.environ
        }
    if choice.backend != "unsloth":
        return
    if "trl" in sys.modules and "unsloth" not in sys.modules:
        raise RuntimeError(
            "unsloth must be imported before trl: call lora_grpo.train.plan.make_plan before "
            "importing lora_grpo.grpo.settings or trl"
        )
    if choice.rollout == "vllm":
        # Standby: vLLM's cache memory is given to the update while vLLM sleeps.
        os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")
    # What it compiles goes to a cache of the user's, not to the folder that the run stands in.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache / "unsloth_compiled_cache"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        importlib.import_module("unsloth")
    except Exception as error:  # whatever a package that does not fit this machine raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"--backend unsloth: the package cannot be imported ({reason}): "
            f"{command_line('doctor.py')} says more; or use --backend transformers"
        ) from error
