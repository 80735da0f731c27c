"""What the GPU tests stand on: what this machine lacks, its models, runs of scripts, figures.

The folders come from the environment: `GPU_MODELS` (of model folders), `GPU_GSM8K` (train.jsonl and
test.jsonl), `GPU_OUT` (where runs, logs and figures go, and where finished runs are found again).
`GPU_TESTS_ON_CPU=1` runs these tests where there is no GPU. Nothing heavy is imported.
"""

import datetime
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from lora_grpo.dev.benchmark import describe_machine
from lora_grpo.machine.backend import Choice, check_4bit, installed
from lora_grpo.machine.hardware import find_gpu

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SCRIPTS = ROOT / "scripts"
ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
GIB = 2**30
NEARLY = 0.9  # a driver keeps some of what the label says
SMALL, SHAPE, REAL = "smollm2-135m-instruct", "qwen2.5-0.5b-random", "qwen2.5-coder-1.5b-instruct"
MODELS = (SMALL, SHAPE, REAL)
VARIED = f"{HERE / 'varied_reward.py'}:varied=1.0"
TAIL = 4000  # characters of a log that a failure shows


def named_folder(variable: str) -> Path | None:
    """Return the folder that a variable names, or None where it is not set or not there."""
    path = Path(os.environ.get(variable) or "/nonexistent").expanduser()
    return path.resolve() if path.is_dir() else None


def model_folder(name: str) -> Path | None:
    """Return one of `MODELS` under `GPU_MODELS`, or None where it was not brought."""
    folder = named_folder("GPU_MODELS")
    return folder / name if folder and (folder / name / "config.json").is_file() else None


@cache
def lacks(need: str | int) -> str | None:
    """Return what this machine lacks of a need (a package, a model, a card of so many GB), as a
    reason to skip, or None."""
    gpu = find_gpu()
    if need == "gpu":
        return None if ON_CPU or gpu else "no GPU: nvidia-smi lists none"
    if isinstance(need, int):
        small = gpu is not None and gpu.total_bytes < NEARLY * need * GIB
        return f"{gpu.name} has less than {need} GB" if small else None
    if need in MODELS:
        where = os.environ.get("GPU_MODELS") or "<unset>"
        return None if model_folder(need) else f"no model: GPU_MODELS={where} holds no {need}"
    if not installed(need):
        return f"{need} is not installed"
    if need == "vllm":
        try:
            check_4bit(Choice("transformers", "vllm", "", ""), gpu, load_in_4bit=True)
        except ValueError as error:
            return str(error)
    return None


def dataset() -> str:
    """Return GSM8K's folder, or the built-in problems."""
    return str(named_folder("GPU_GSM8K") or "arithmetic")


def small_model() -> tuple[str, ...]:
    """Return the flags of a small model and its data: SmolLM2 on GSM8K, or what the package has."""
    folder = model_folder(SMALL)
    if folder is None:
        return ("--model", "tiny", "--max-prompt-length", "160", "--dataset", "arithmetic")
    return ("--model", str(folder), "--max-prompt-length", "384", "--dataset", dataset())


def run(log: Path, seconds: float, script: Path, *arguments: object) -> str:
    """Run a script offline in a process of its own, its output in `log`, and return the output.

    Raises:
        AssertionError: it failed or took longer; the message holds the end of its output.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not ON_CPU:
        environment.pop("OMP_NUM_THREADS", None)  # tests/conftest.py sets it for tests in parallel
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *map(str, arguments)]
    with log.open("w", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        settings = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment}
        try:
            done = subprocess.run(command, timeout=seconds, check=False, **settings)
            status = f"ended with status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            status = f"took more than {seconds:.0f} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    if status:
        raise AssertionError(f"{script.name} {status}, see {log}:\n{text[-TAIL:]}")
    return text


@cache
def setting() -> dict[str, Any]:
    """Return date, hardware and versions, which belong to every figure."""
    gpu = find_gpu()
    known = {"date": datetime.date.today().isoformat(), "driver": gpu.driver if gpu else None}
    return known | describe_machine()


def keep_figure(out: Path, name: str, value: Any, unit: str = "") -> None:
    """Print a figure, and add it to figures.jsonl with date, hardware and versions."""
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"\nfigure: {name} = {shown} {unit}".rstrip(), flush=True)
    row = {"name": name, "value": value, "unit": unit, **setting()}
    with (out / "figures.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
