"""What the GPU tests stand on: what this machine lacks, its models, runs of scripts, figures.

The folders come from the environment: `GPU_MODELS` (of model folders), `GPU_GSM8K` (train.jsonl and
test.jsonl), `GPU_OUT` (where runs, logs and figures go, and where finished runs are found again).
`GPU_TESTS_ON_CPU=1` proves these files themselves where there is no GPU. Nothing heavy is imported.
"""

import datetime
import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_grpo.machine.backend import Choice, check_4bit, installed
from lora_grpo.machine.hardware import find_gpu

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
GIB = 2**30
NEARLY = 0.9  # a driver keeps some of what the label says
SMALL, SHAPE, REAL = "smollm2-135m-instruct", "qwen2.5-0.5b-random", "qwen2.5-coder-1.5b-instruct"
MODELS = (SMALL, SHAPE, REAL)
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "vllm")
VARIED = f"{HERE / 'varied_reward.py'}:varied=1.0"
TAIL = 4000


def named_folder(variable: str) -> Path | None:
    """Return the folder that a variable names, or None where it is not set or not there."""
    path = Path(os.environ.get(variable) or "/nonexistent").expanduser()
    return path.resolve() if path.is_dir() else None


def model_folder(name: str) -> Path | None:
    """Return one of `MODELS` under `GPU_MODELS`, or None where it was not brought."""
    folder = named_folder("GPU_MODELS")
    return folder / name if folder and (folder / name / "config.json").is_file() else None


def lacks_vllm() -> str | None:
    """Return why vLLM cannot sample from a 4-bit base here, or None."""
    if not installed("vllm"):
        return "vllm is not installed"
    try:
        check_4bit(Choice("transformers", "vllm", "", ""), find_gpu(), load_in_4bit=True)
    except ValueError as error:
        return str(error)
    return None


def lacks_card(gigabytes: int) -> str | None:
    """Return why the card cannot stand for one of so many GB, or None."""
    gpu = find_gpu()
    if gpu is None or gpu.total_bytes >= NEARLY * gigabytes * GIB:
        return None
    return f"{gpu.name} has {gpu.total_bytes / GIB:.1f} GB, which is no card of {gigabytes} GB"


@cache
def lacks(need: str | int) -> str | None:
    """Return what this machine lacks of a need, as a reason to skip, or None."""
    if need == "gpu":
        return None if ON_CPU or find_gpu() else "no GPU: nvidia-smi lists none"
    if need == "vllm":
        return lacks_vllm()
    if need in MODELS:
        return None if model_folder(need) else f"no model: GPU_MODELS={need_hint()} holds no {need}"
    if isinstance(need, int):
        return lacks_card(need)
    return None if installed(need) else f"{need} is not installed"


def need_hint() -> str:
    return os.environ.get("GPU_MODELS") or "<unset>"


def small_model() -> tuple[str, ...]:
    """Return the flags of a small model and its data: SmolLM2 on GSM8K, or what the package has."""
    folder = model_folder(SMALL)
    if folder is None:
        return ("--model", "tiny", "--max-prompt-length", "160", "--dataset", "arithmetic")
    return ("--model", str(folder), "--max-prompt-length", "384", "--dataset", dataset())


def dataset() -> str:
    """Return GSM8K's folder, or the built-in problems."""
    return str(named_folder("GPU_GSM8K") or "arithmetic")


def child_environment() -> dict[str, str]:
    """Return a process's environment: offline, this checkout's code, every core beside a GPU."""
    found = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if not ON_CPU:
        found.pop("OMP_NUM_THREADS", None)  # tests/conftest.py sets it for tests side by side
    return found


def run(log: Path, seconds: float, script: Path, *arguments: object) -> str:
    """Run a script in a process of its own, its output in `log`, and return the output.

    Raises:
        AssertionError: it failed or took longer; the message holds the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *map(str, arguments)]
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=child_environment(),
                timeout=seconds,
                check=False,
            )
            status = f"ended with status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            status = f"took more than {seconds:.0f} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    if status:
        raise AssertionError(f"{script.name} {status}, see {log}:\n{text[-TAIL:]}")
    return text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def setting() -> dict[str, Any]:
    """Return date, hardware and versions, which belong to every figure."""
    gpu = find_gpu()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu.name if gpu else None,
        "driver": gpu.driver if gpu else None,
        "versions": {package: find_version(package) for package in PACKAGES},
    }


def keep_figure(out: Path, name: str, value: Any, unit: str = "") -> None:
    """Print a figure, and add it to figures.jsonl with date, hardware and versions."""
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"\nfigure: {name} = {shown} {unit}".rstrip(), flush=True)
    row = {"name": name, "value": value, "unit": unit, **setting()}
    with (out / "figures.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
