"""What the doctor says of the machine around the GPU: Python, system, processor, memory, disk, and
the Hugging Face Hub with its token and its cache.

Each fact becomes a `Row`; one that is not right carries what to type. A token is never read further
than to say whether there is one.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Literal

from lora_grpo.machine.hardware import available_memory, total_memory

GIB = 2**30
LEAST_MEMORY = 2 * GIB
LEAST_DISK = GIB
LEAST_CACHE_DISK = 3 * GIB
HUB_SECONDS = 5.0
NO_NETWORK = "train with --preset tiny, which needs no network"


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
    """Return what is known of Python, the system, its processor, memory and disk."""
    return [
        python_row(),
        os_row(),
        cpu_row(),
        memory_row(available_memory()),
        disk_row(adapters_dir),
    ]


def supported_python() -> str:
    """Return the package's own `Requires-Python`, or nothing where it is not installed."""
    try:
        return metadata("lora-grpo").get("Requires-Python", "")
    except PackageNotFoundError:
        return ""


def python_row(
    version: tuple[int, int] = sys.version_info[:2], supported: str | None = None
) -> Row:
    supported = supported_python() if supported is None else supported
    bounds = {
        sign: (int(major), int(minor))
        for sign, major, minor in re.findall(r"(>=|<)(\d+)\.(\d+)", supported)
    }
    value = f"{platform.python_version()} ({sys.executable})"
    if bounds.get(">=", version) <= version < bounds.get("<", (version[0], version[1] + 1)):
        return Row("machine", "python", value)
    python = "python{}.{}".format(*bounds.get(">=", (3, 11)))
    return Row(
        "machine",
        "python",
        f"{value}; the suite needs {supported}",
        "problem",
        f"make a new environment with {python} -m venv .venv, and install the requirements in it",
    )


def os_row() -> Row:
    kernel = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux":
        advice = "on Windows use WSL 2; elsewhere expect a CPU run at best"
        return Row("machine", "os", f"{kernel}; tested on Linux only", "warning", advice)
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    return Row("machine", "os", f"{name} ({kernel})")


def cpu_row() -> Row:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = fields.get("flags", "").split()
    best = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [fields.get("model name", platform.machine()), f"{cores} cores", best.upper()]
    return Row("machine", "cpu", ", ".join(part for part in parts if part))


def memory_row(available: int) -> Row:
    value = f"{gib(available)} available of {gib(total_memory())}"
    if available >= LEAST_MEMORY:
        return Row("machine", "ram", value)
    advice = f"close other programs: loading the packages and a model takes {gib(LEAST_MEMORY)}"
    return Row("machine", "ram", value, "problem", advice)


def disk_row(adapters_dir: Path, least: int = LEAST_DISK) -> Row:
    """Return whether a run could be written, by writing an empty file and taking it away again."""
    folder = next(
        path
        for path in (adapters_dir.absolute(), *adapters_dir.absolute().parents)
        if path.exists()
    )
    elsewhere = "name a folder on another disk by --adapters-dir"
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        value = f"{adapters_dir} cannot be written: {error.strerror}"
        return Row("machine", "disk", value, "problem", f"run where you may write, or {elsewhere}")
    value = f"{gib(free)} free for {adapters_dir}"
    if free >= least:
        return Row("machine", "disk", value)
    return Row("machine", "disk", value, "problem", f"free {gib(least)}, or {elsewhere}")


def hub_rows(model: str | None, endpoint: str | None = None) -> list[Row]:
    """Return whether the Hub answers, whether there is a token, and the size of the cache.

    `model` is the Hub model that the run would load, or None where it needs no network; `endpoint`
    defaults to `huggingface_hub`'s own, which heeds HF_ENDPOINT.
    """
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        advice = "pip install -r requirements-cpu.txt"
        return [Row("hub", "hub", f"huggingface_hub: {error}", "warning", advice)]
    token = "present" if get_token() else "none: pushing and gated models need `hf auth login`"
    return [
        reach_row(model, endpoint or constants.ENDPOINT, constants.HF_HUB_OFFLINE),
        Row("hub", "token", token),
        cache_row(Path(constants.HF_HUB_CACHE), downloads=model is not None),
    ]


def reach_row(model: str | None, endpoint: str, offline: bool) -> Row:
    if offline:
        return unreached(model, "not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    from huggingface_hub.utils import get_session

    start = time.perf_counter()
    try:
        status = get_session().head(endpoint, timeout=HUB_SECONDS).status_code
    except Exception as error:  # whatever the HTTP client raises is what the row says
        reason = (str(error).strip().splitlines() or [""])[-1]
        value = f"{endpoint} does not answer: {type(error).__name__}: {reason}"
        mend = "check the network and HTTPS_PROXY, or name a mirror in HF_ENDPOINT"
        return unreached(model, value, mend)
    value = f"{endpoint} answers in {time.perf_counter() - start:.1f} s"
    if status < 400:
        return Row("hub", "hub", value)
    advice = "check HF_ENDPOINT and HTTPS_PROXY: something other than the Hub may be answering"
    return Row("hub", "hub", f"{value} with HTTP status {status}", "warning", advice)


def unreached(model: str | None, value: str, mend: str) -> Row:
    """Judge a Hub out of reach: it stops a run only where the model is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    if model is None:
        return Row("hub", "hub", value, "warning", f"{mend}; --preset tiny needs no network")
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        value = f"{value}; {model} is in the cache"
        return Row("hub", "hub", value, "warning", f"{mend}, if the dataset is not cached too")
    value = f"{value}; {model} is not in the cache"
    return Row("hub", "hub", value, "problem", f"{mend}, or {NO_NETWORK}")


def cache_row(folder: Path, downloads: bool) -> Row:
    """Measure the cache; links to a blob are not counted again."""
    size = 0
    for where, _, names in os.walk(folder):
        size += sum(os.lstat(os.path.join(where, name)).st_size for name in names)
    kept = len([*folder.glob("models--*"), *folder.glob("datasets--*")])
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    value = f"{gib(size)} in {folder} ({kept} models and datasets), {gib(free)} free"
    if free >= LEAST_CACHE_DISK or not downloads:
        return Row("hub", "cache", value)
    advice = f"free {gib(LEAST_CACHE_DISK)} for the model, or name another disk in HF_HOME"
    return Row("hub", "cache", value, "warning", advice)
