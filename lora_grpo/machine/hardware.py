"""The machine: its GPU, its memory and processor; torch is never loaded into this process.

The driver's own tool answers at once. Where it does not know what torch would use (it is missing, a
card is cut into MIG slices, ROCm), torch is asked in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SECONDS = 20
TORCH_SECONDS = 120  # a first import from a slow disk
FIELDS = "name,driver_version,compute_cap,memory.total,memory.free,mig.mode.current"
# What a driver puts there, of NVIDIA's, WSL's, ROCm's and Jetson's.
DEVICES = ("nvidiactl", "nvidia0", "dxg", "kfd", "nvgpu", "nvhost-gpu")
ASK_TORCH = """
import json, torch
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    driver = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    print(json.dumps([card.name, driver, float(f"{card.major}.{card.minor}"), total, free]))
"""
BFLOAT16_SINCE = 8.0


@dataclass(frozen=True)
class GPU:
    """The GPU that a run would use; memory in bytes."""

    name: str
    driver: str
    compute_capability: float
    total_bytes: int
    free_bytes: int

    @property
    def has_bfloat16(self) -> bool:
        """Ampere (8.0) and later compute in bfloat16; Turing, such as a T4, does not."""
        return self.compute_capability >= BFLOAT16_SINCE


def number(text: str) -> float:
    """Return the number in a cell of nvidia-smi's, 0 where it says that it does not know."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def find_gpu() -> GPU | None:
    """Return the GPU that a run would use, or None where there is none.

    `CUDA_VISIBLE_DEVICES` is heeded: empty or -1 hides every GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    cells = ask_driver(visible)
    if len(cells) != len(FIELDS.split(",")) or cells[-1] == "Enabled":
        return gpu_by_torch(visible) if has_device() else None
    name, driver, capability, total, free, _ = cells
    mib = 2**20
    return GPU(name, driver, number(capability), int(number(total)) * mib, int(number(free)) * mib)


def ask_driver(visible: str | None) -> list[str]:
    """Return what nvidia-smi says of the first visible GPU, one text for each of `FIELDS`; nothing
    where it is missing or fails."""
    chosen = ["-i", visible.split(",")[0].strip()] if visible else []
    query = [f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.check_output(
            ["nvidia-smi", *chosen, *query], stderr=subprocess.DEVNULL, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [cell.strip() for cell in said.strip().partition("\n")[0].split(",")]


def has_device() -> bool:
    """Return whether there is any sign of a GPU, so that torch is worth the seconds of asking."""
    return shutil.which("nvidia-smi") is not None or any(
        Path("/dev", name).exists() for name in DEVICES
    )


@cache
def gpu_by_torch(visible: str | None) -> GPU | None:
    """Return the first GPU that torch finds among the visible ones, asked once; None without one or
    without torch."""
    try:
        said = subprocess.check_output(
            [sys.executable, "-c", ASK_TORCH],
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=TORCH_SECONDS,
        )
        return GPU(*json.loads(said.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def total_memory() -> int:
    """Return the machine's memory in bytes, or the control group's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def available_memory() -> int:
    """Return the bytes that a new process can take before the machine swaps."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return total_memory()
    found = {line.partition(":")[0]: line.split()[1] for line in lines}
    return min(int(found["MemAvailable"]) * 1024, total_memory())
