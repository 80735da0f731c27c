"""The GPU: what the driver says of it, whether this torch can use it, and who holds its memory.

The driver is asked through nvidia-smi; what torch says comes from the probe that imported it.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.doctor.machine import GIB, Row, gib
from lora_grpo.doctor.probes import Outcome
from lora_grpo.machine.hardware import GPU, SECONDS, ask_nvidia_smi, number, selection

# NVIDIA, CUDA Compatibility, table 1: the least driver for every minor version of a CUDA major.
LEAST_DRIVER = {12: 525, 13: 580}
LEAST_FREE = 5 * GIB
UNNAMED = GIB
PCI = Path("/sys/bus/pci/devices")
SELECTOR = 'the selector on PyTorch\'s "Get started" page gives the command'


@dataclass(frozen=True)
class Holder:
    """A process with memory on the GPU; `size` in bytes, 0 where the driver does not say."""

    pid: str
    name: str
    size: int


def find_holders() -> list[Holder]:
    """Return the processes that compute on the chosen GPU."""
    query = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    found = []
    for line in (ask_nvidia_smi(*selection(), *query) or "").splitlines():
        pid, _, rest = line.partition(",")
        name, _, size = rest.rpartition(",")
        if pid.strip().isdigit():
            found.append(Holder(pid.strip(), Path(name.strip()).name, int(number(size)) * 2**20))
    return found


def driver_cuda() -> str | None:
    """Return the newest CUDA that the driver speaks, from nvidia-smi's heading (worded anew in
    drivers from 610 on)."""
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", ask_nvidia_smi() or "")
    return found and found[1]


def gpu_rows(gpu: GPU | None, holders: list[Holder], cuda: str | None, torch: Outcome) -> list[Row]:
    """Return what is known of the GPU, or why there is none."""
    if gpu is None:
        return [no_gpu_row()]
    half = "yes" if gpu.has_bfloat16 else "no, it computes in float16"
    return [
        Row("gpu", "gpu", f"{gpu.name}, {gib(gpu.total_bytes)}"),
        Row("gpu", "driver", gpu.driver),
        cuda_row(gpu, cuda, torch),
        capability_row(gpu, torch),
        Row("gpu", "bfloat16", half),
        memory_row(gpu, holders),
        Row("gpu", "held by", describe_holders(gpu, holders)),
    ]


def cuda_row(gpu: GPU, cuda: str | None, torch: Outcome) -> Row:
    """Compare what the driver speaks with what torch was built for."""
    driver = f"driver: up to {cuda or 'unknown'}"
    if torch.error is not None:
        return Row("gpu", "cuda", f"{driver}; torch cannot say what it was built for")
    built, kernel = torch.facts["cuda"], torch.facts["kernel"]
    if built is None:
        value = f"{driver}; torch {torch.facts['version']} was built for the CPU alone"
        return Row("gpu", "cuda", value, "problem", for_the_cpu(gpu))
    value = f"{driver}; torch was built for {built}"
    least = LEAST_DRIVER.get(int(built.partition(".")[0]), 0)
    if kernel is None:
        return Row("gpu", "cuda", f"{value} and runs")
    if major(gpu) < least:
        value = f"{value}, which needs driver {least} or newer, got {gpu.driver}"
        return Row("gpu", "cuda", value, "problem", ways_out(gpu, least))
    if "out of memory" in kernel:
        return Row("gpu", "cuda", f"{value}; {kernel}", "problem", "free memory on the GPU")
    if not runs_on(torch.facts["archs"], gpu.compute_capability):
        return Row("gpu", "cuda", value)
    advice = "reboot if the driver was just updated; start a container with --gpus all"
    return Row("gpu", "cuda", f"{value}, but cannot compute: {kernel}", "problem", advice)


def major(gpu: GPU) -> int:
    return int(number(gpu.driver.partition(".")[0]))


def newest_cuda(gpu: GPU) -> int | None:
    """Return the newest CUDA major that this driver runs and torch is still built for."""
    return max((cuda for cuda, least in LEAST_DRIVER.items() if major(gpu) >= least), default=None)


def ways_out(gpu: GPU, least: int) -> str:
    """Return the two ways out of a driver too old: a newer driver, or a build for an older CUDA."""
    driver = f"update the driver (on Ubuntu: sudo apt install nvidia-driver-{least}, then reboot)"
    if (cuda := newest_cuda(gpu)) is None:
        return f"{driver}: no build of this torch is for a CUDA that old"
    return f"either {driver}, or {install_for(cuda)}, and vllm's for the same CUDA"


def install_for(cuda: int) -> str:
    return f"install the build of torch for CUDA {cuda} ({SELECTOR})"


def for_the_cpu(gpu: GPU) -> str:
    """Return the way from a torch for the CPU to one for this driver."""
    cuda = newest_cuda(gpu)
    if cuda == max(LEAST_DRIVER):
        return "pip uninstall -y torch && pip install -r requirements.txt"
    return ways_out(gpu, max(LEAST_DRIVER)) if cuda is None else install_for(cuda)


def runs_on(archs: list[str], capability: float) -> bool:
    """Return whether a torch built for these architectures has code for a GPU.

    Machine code (`sm_86`) runs on its own major from that minor on, PTX (`compute_90`) on all that
    is newer, and a letter at the end (`sm_90a`) ties to one. An empty list says nothing.
    """
    wanted = divmod(round(10 * capability), 10)
    for arch in archs:
        kind, _, digits = arch.partition("_")
        built = (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else None
        if built and built <= wanted and (kind == "compute" or built[0] == wanted[0]):
            return True
    return not archs


def capability_row(gpu: GPU, torch: Outcome) -> Row:
    value = f"{gpu.compute_capability:g}"
    archs = torch.facts.get("archs", [])
    if runs_on(archs, gpu.compute_capability):
        return Row("gpu", "compute capability", value)
    value = f"{value}; torch has code for {' '.join(archs)} only"
    advice = f"install a build of torch that has code for this GPU ({SELECTOR})"
    return Row("gpu", "compute capability", value, "problem", advice)


def memory_row(gpu: GPU, holders: list[Holder]) -> Row:
    value = f"{gib(gpu.free_bytes)} free of {gib(gpu.total_bytes)}"
    if gpu.free_bytes >= LEAST_FREE:
        return Row("gpu", "memory", value)
    if gpu.total_bytes < LEAST_FREE:
        advice = "the preset is made for cards of 6 GB and up: add --preset smollm2-135m"
    elif holders:
        pids = " ".join(holder.pid for holder in holders)
        advice = f"end those of these processes that you do not need: kill {pids}"
    else:
        advice = "close other programs that use the GPU: nvidia-smi lists them"
    return Row("gpu", "memory", value, "warning", advice)


def describe_holders(gpu: GPU, holders: list[Holder]) -> str:
    if holders:
        return ", ".join(
            f"{holder.name} (pid {holder.pid}, {gib(holder.size) if holder.size else 'unknown'})"
            for holder in holders
        )
    used = gpu.total_bytes - gpu.free_bytes
    if used < UNNAMED:
        return "nobody"
    return f"{gib(used)} by what the driver does not name: another container, or the screen"


def no_gpu_row(pci: Path = PCI) -> Row:
    """Say why there is no GPU; a card without a working driver is told from no card."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return Row("gpu", "gpu", f"hidden: CUDA_VISIBLE_DEVICES is {visible.strip() or 'empty'}")
    if shutil.which("nvidia-smi"):
        return unreadable_gpu_row()
    if has_nvidia_card(pci):
        advice = "install NVIDIA's driver (on Ubuntu: sudo ubuntu-drivers install, then reboot)"
        value = "an NVIDIA card, but no driver (nvidia-smi is not there)"
        return Row("gpu", "gpu", value, "warning", advice)
    return Row("gpu", "gpu", "none: it trains on the CPU")


def unreadable_gpu_row() -> Row:
    """Say why nvidia-smi describes no GPU; an old driver lists one, but not what it can do."""
    try:
        command = ["nvidia-smi", *selection(), "-L"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        lines = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
        listed = done.returncode == 0 and "GPU" in done.stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        lines, listed = [str(error)], False
    if listed:
        value = f"none that a run would use: the driver is too old to describe {lines[0]}"
        advice = f"update the driver to {max(LEAST_DRIVER.values())} or newer"
        return Row("gpu", "gpu", value, "warning", advice)
    advice = (
        "reboot if the driver was just updated, else install it anew; check CUDA_VISIBLE_DEVICES"
    )
    return Row("gpu", "gpu", f"none that nvidia-smi can use: {lines[-1]}", "warning", advice)


def has_nvidia_card(pci: Path) -> bool:
    """Return whether a display device (class 03) of vendor 10de is plugged in."""
    for device in pci.glob("*"):
        try:
            kind = (device / "class").read_text(encoding="ascii")
            vendor = (device / "vendor").read_text(encoding="ascii")
        except OSError:
            continue
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            return True
    return False
