"""What the doctor says of the machine: Python, system, memory, disk, the GPU, the Hugging Face Hub.

Each fact becomes a `Row`; one that is not right carries what to type. A token is never read further
than to say whether there is one.
"""

import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.files import check_room
from lora_grpo.machine.hardware import GPU, available_memory, number, total_memory
from lora_grpo.machine.terminal import NEEDED

GIB = 2**30
LEAST_MEMORY = 2 * GIB
LEAST_DISK = GIB
LEAST_GPU_MEMORY = 5 * GIB
HUB_SECONDS = 5.0
# NVIDIA, CUDA Compatibility, table 1: the least driver for every minor version of a CUDA major.
LEAST_DRIVER = {12: 525, 13: 580}
OTHER_TORCH = (
    "install the build of torch for this GPU and driver (the selector on PyTorch's "
    '"Get started" page gives the command)'
)


@dataclass(frozen=True)
class Row:
    """One fact, how well it is, and what to do where it is not."""

    section: str
    name: str
    value: str
    status: Literal["ok", "warning", "problem"] = "ok"
    advice: str | None = None


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def machine_rows(adapters_dir: Path) -> list[Row]:
    """Return what is known of Python, the system, its memory and disk."""
    system = f"{platform.platform()}, {os.cpu_count()} CPUs"
    return [
        python_row(sys.version_info[:2]),
        Row("machine", "system", system),
        memory_row(available_memory()),
        disk_row(adapters_dir),
    ]


def python_row(version: tuple[int, int]) -> Row:
    value = f"{platform.python_version()} ({sys.executable})"
    if NEEDED[0] <= version < NEEDED[1]:
        return Row("machine", "python", value)
    advice = "make a new environment with python3.12 -m venv .venv, and install again in it"
    return Row("machine", "python", f"{value}; 3.11 or 3.12 is needed", "problem", advice)


def memory_row(available: int) -> Row:
    value = f"{gib(available)} available of {gib(total_memory())}"
    if available >= LEAST_MEMORY:
        return Row("machine", "ram", value)
    advice = f"close other programs: loading the packages and a model takes {gib(LEAST_MEMORY)}"
    return Row("machine", "ram", value, "problem", advice)


def disk_row(adapters_dir: Path, least: int = LEAST_DISK) -> Row:
    try:
        free = check_room(adapters_dir, least, "--adapters-dir")
    except OSError as error:
        advice = "name another folder with --adapters-dir, here and for train_lora.py"
        return Row("machine", "disk", str(error), "problem", advice)
    return Row("machine", "disk", f"{gib(free)} free for {adapters_dir}")


def gpu_row(gpu: GPU | None, torch: Outcome) -> Row:
    """Return what the driver says of the GPU, and whether this torch can compute on it."""
    if gpu is None:
        return no_gpu_row()
    half = "bfloat16" if gpu.has_bfloat16 else "float16"
    value = (
        f"{gpu.name}, {gib(gpu.free_bytes)} free of {gib(gpu.total_bytes)}, compute capability "
        f"{gpu.compute_capability:g} ({half}), driver {gpu.driver}"
    )
    if torch.error is None and torch.facts["cuda"] is None:
        value += f"; torch {torch.facts['version']} was built for the CPU alone"
        return Row("gpu", "gpu", value, "problem", OTHER_TORCH)
    if torch.error is None and torch.facts["kernel"] is not None:
        cuda, why = torch.facts["cuda"], torch.facts["kernel"]
        value += f"; torch, built for CUDA {cuda}, cannot compute: {why}"
        return Row("gpu", "gpu", value, "problem", advise_on_cuda(gpu.driver, cuda, why))
    if gpu.total_bytes < LEAST_GPU_MEMORY:
        advice = "the preset is made for cards of 6 GB and up: add --preset smollm2-135m"
        return Row("gpu", "gpu", value, "warning", advice)
    if gpu.free_bytes < LEAST_GPU_MEMORY:
        advice = "close other programs that use the GPU: nvidia-smi lists them"
        return Row("gpu", "gpu", value, "warning", advice)
    return Row("gpu", "gpu", value)


def advise_on_cuda(driver: str, cuda: str, why: str) -> str:
    """Return what to do where a torch built for this CUDA cannot compute."""
    if "out of memory" in why:
        return "close other programs that use the GPU: nvidia-smi lists them"
    least = LEAST_DRIVER.get(int(number(cuda.partition(".")[0])), 0)
    if 0 < number(driver.partition(".")[0]) < least:  # torch, where it was asked, knows none
        update = f"update the driver to {least} or newer, which CUDA {cuda} needs, and reboot"
        return f"{update}; or {OTHER_TORCH}, and vllm's for the same CUDA"
    return (
        f"reboot if the driver was just updated; start a container with --gpus all; {OTHER_TORCH}"
    )


def no_gpu_row() -> Row:
    """Return why there is no GPU; a driver that cannot be asked is not the same as none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return Row("gpu", "gpu", f"hidden: CUDA_VISIBLE_DEVICES is {visible.strip() or 'empty'}")
    if shutil.which("nvidia-smi") is None:
        return Row("gpu", "gpu", "none, as there is no nvidia-smi: it trains on the CPU")
    advice = (
        "type nvidia-smi to see what is wrong; reboot if the driver was just updated, else install "
        f"{max(LEAST_DRIVER.values())} or newer"
    )
    return Row("gpu", "gpu", "none that nvidia-smi can describe", "warning", advice)


def hub_row(model: str | None, endpoint: str | None = None) -> Row:
    """Return whether the Hub answers and whether there is a token.

    `model` is the Hub model that the run would load, or None where it needs no network; `endpoint`
    defaults to `huggingface_hub`'s own, which heeds HF_ENDPOINT.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return unreached(model, "not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    endpoint, start = endpoint or constants.ENDPOINT, time.perf_counter()
    try:
        status = get_session().head(endpoint, timeout=HUB_SECONDS).status_code
    except Exception as error:  # whatever the HTTP client raises is what the row says
        value = f"{endpoint} does not answer: {type(error).__name__}: {error}"
        mend = "check the network and HTTPS_PROXY, or name a mirror in HF_ENDPOINT"
        return unreached(model, value, mend)
    token = "there is a token" if get_token() else "no token: to push, type `hf auth login`"
    value = f"{endpoint} answers in {time.perf_counter() - start:.1f} s; {token}"
    if status < 400:
        return Row("hub", "hub", value)
    advice = "check HF_ENDPOINT and HTTPS_PROXY: something other than the Hub may be answering"
    return Row("hub", "hub", f"{value}; HTTP status {status}", "warning", advice)


def unreached(model: str | None, value: str, mend: str) -> Row:
    """Judge a Hub out of reach: it stops a run only where the model is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    if model is None:
        return Row("hub", "hub", value, "warning", f"{mend}; --preset tiny needs no network")
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        value = f"{value}; {model} is in the cache"
        return Row("hub", "hub", value, "warning", f"{mend}, if the dataset is not cached too")
    value = f"{value}; {model} is not in the cache"
    return Row("hub", "hub", value, "problem", f"{mend}, or train with --preset tiny")
