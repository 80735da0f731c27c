"""Can the packages be imported? Each is tried in a process of its own, so that a crash, a hang or a
broken library is an `Outcome` and not the doctor's own end.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "doctor:"
CHILD = f"""
import sys
sys.path = [entry for entry in sys.path if entry]  # not the folder that the doctor was started in
import importlib, json, time
def say(**found):
    print("\\n{MARK}" + json.dumps(found), flush=True)
modules, check = json.loads(sys.argv[1])
start, facts = time.perf_counter(), {{}}
try:
    for module in modules:
        say(at=module)
        importlib.import_module(module)
    exec(check)
except BaseException as error:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    say(error=f"{{type(error).__name__}}: {{lines[-1]}}")
    sys.exit(1)
say(facts=facts, seconds=time.perf_counter() - start)
"""
TRY_TORCH = """
import torch
facts.update(version=torch.__version__, cuda=torch.version.cuda, kernel=None)
if torch.version.cuda:
    try:
        torch.ones(1, device="cuda").add(1).item()
    except Exception as error:
        facts["kernel"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
"""
TRY_BITSANDBYTES = """
import torch
from bitsandbytes.functional import quantize_4bit
try:
    weight = torch.ones(64, device="cuda")
except Exception:
    weight = torch.ones(64)
quantize_4bit(weight, quant_type="nf4")
"""
# What to import and then to try, by the name of the row.
PROBES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("torch",), TRY_TORCH),
    "bitsandbytes": (("bitsandbytes",), TRY_BITSANDBYTES),
    "trl": (
        ("transformers", "datasets", "peft", "trl"),
        "from trl import GRPOConfig, GRPOTrainer",
    ),
    "unsloth": (("unsloth",), ""),
    "vllm": (("vllm",), "from vllm import LLM, SamplingParams"),
}
SIGNALS = {
    "SIGSEGV": "a segmentation fault",
    "SIGILL": "an instruction that this processor lacks",
    "SIGKILL": "most likely for want of memory",
}


@dataclass(frozen=True)
class Outcome:
    """How an import went: `error` is None where it worked, `facts` what was found then."""

    seconds: float
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    timed_out: bool = False


def run_probes(names: Sequence[str], seconds: float) -> dict[str, Outcome]:
    """Try all imports at the same time; `seconds` is what each of them gets."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        outputs = {name: Path(folder, name) for name in names}
        children = {name: start(name, output) for name, output in outputs.items()}
        for child in children.values():
            stack.enter_context(child)
            stack.callback(child.kill)
        return {
            name: read_outcome(name, wait_until(end, children[name]), output, seconds)
            for name, output in outputs.items()
        }


def start(name: str, output: Path) -> subprocess.Popen:
    """Start a process that tries an import and prints into a file: a grandchild that keeps a pipe
    open would outlast the time limit."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(PROBES[name])],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.DEVNULL,
        )


def wait_until(end: float, child: subprocess.Popen) -> int | None:
    """Return the exit status of a process, or None where it still runs at the end."""
    try:
        return child.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def read_outcome(name: str, code: int | None, output: Path, limit: float) -> Outcome:
    """Put together what a process printed of its import, or how it ended where it could not."""
    said: dict[str, Any] = {}
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(MARK):
            said |= json.loads(line.removeprefix(MARK))
    if "facts" in said:
        return Outcome(said["seconds"], facts=said["facts"])
    at = said.get("at", name)
    error = said.get("error") or describe_end(code, limit)
    return Outcome(limit, error if at == name else f"{at}: {error}", timed_out=code is None)


def describe_end(code: int | None, limit: float) -> str:
    """Return how a process ended that could not say it itself; None is the time limit."""
    if code is None:
        return f"no end after {limit:g} s"
    if code >= 0:
        return f"the process ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (f", {SIGNALS[name]}" if name in SIGNALS else "")
