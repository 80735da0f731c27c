"""The machine: its GPU by what the driver's own tool says, its memory and processor; torch is never
loaded."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20
FIELDS = "name,driver_version,compute_cap,memory.total,memory.free"
BFLOAT16_SINCE = 8.0


@dataclass(frozen=True)
class GPU:
    """The first GPU that nvidia-smi lists; memory in bytes."""

    name: str
    driver: str
    compute_capability: float
    total_bytes: int
    free_bytes: int

    @property
    def has_bfloat16(self) -> bool:
        """Ampere (8.0) and later compute in bfloat16; Turing, such as a T4, does not."""
        return self.compute_capability >= BFLOAT16_SINCE


def ask_nvidia_smi(*arguments: str) -> str | None:
    """Return what nvidia-smi printed, or None where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def number(text: str, default: float = 0.0) -> float:
    try:
        return float(text)
    except ValueError:
        return default


def selection() -> list[str]:
    """Return nvidia-smi's flag for the first GPU of `CUDA_VISIBLE_DEVICES`, or none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ["-i", visible.split(",")[0].strip()] if visible else []


def find_gpu() -> GPU | None:
    """Return the GPU that a run would use, or None where the driver lists none.

    `CUDA_VISIBLE_DEVICES` is heeded: empty or -1 hides every GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    listed = ask_nvidia_smi(*selection(), f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")
    if not listed or not listed.strip():
        return None
    cells = [cell.strip() for cell in listed.strip().splitlines()[0].split(",")]
    if len(cells) != len(FIELDS.split(",")):
        return None
    name, driver, capability, total, free = cells
    mib = 2**20
    return GPU(name, driver, number(capability), int(number(total)) * mib, int(number(free)) * mib)


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
