"""Can the packages be imported? They are tried in other processes, so that a crash, a hang or a
broken library is an `Outcome` and not the doctor's own end.

Packages that load each other share a process, which halves the time; what follows a failure is
tried in a new one.
"""

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "doctor:"
CHILD = f"""
import sys
sys.path = [entry for entry in sys.path if entry]  # not the folder that the doctor was started in
import importlib, json, time
def say(**found):
    print("\\n{MARK}" + json.dumps(found), flush=True)
for name, modules, check in json.loads(sys.argv[1]):
    start, facts = time.perf_counter(), {{}}
    try:
        for module in modules:
            say(name=name, at=module)
            importlib.import_module(module)
        exec(check)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        while error.__cause__ is not None:
            error = error.__cause__
        lines = str(error).strip().splitlines() or [""]
        say(name=name, error=f"{{type(error).__name__}}: {{lines[-1]}}")
        sys.exit(1)
    say(name=name, facts=facts, seconds=time.perf_counter() - start)
"""
TRY_TORCH = """
import torch
facts.update(version=torch.__version__, cuda=torch.version.cuda, archs=torch.cuda.get_arch_list())
facts.update(kernel=None)
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
# Set once Ctrl-C has reached the main thread: the processes that other threads wait for end then.
INTERRUPTED = threading.Event()
LOOK_SECONDS = 0.05
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
    """Try the imports in this order; `seconds` is what a process gets."""
    found: dict[str, Outcome] = {}
    while (left := [name for name in names if name not in found]) and not INTERRUPTED.is_set():
        found |= run_child(left, seconds)
    return found


def run_child(names: Sequence[str], seconds: float) -> dict[str, Outcome]:
    """Try imports in one process until one fails; returns at least one outcome."""
    work = json.dumps([(name, *PROBES[name]) for name in names])
    # A file and no pipe: a grandchild that keeps a pipe open would outlast the time limit.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, work],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
        )
        code = wait_for(child, seconds)
        if code == -signal.SIGINT:
            raise KeyboardInterrupt
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    said: dict[str, dict[str, Any]] = {names[0]: {}}
    for line in lines:
        if line.startswith(MARK):
            heard = json.loads(line.removeprefix(MARK))
            said.setdefault(heard["name"], {}).update(heard)
    return {name: read_outcome(name, heard, code, seconds) for name, heard in said.items()}


def wait_for(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return a process's exit status, or None after it had to be ended."""
    end = time.monotonic() + seconds
    while child.poll() is None:
        if INTERRUPTED.wait(LOOK_SECONDS) or time.monotonic() > end:
            child.kill()
            child.wait()
            return None
    return child.returncode


def read_outcome(name: str, heard: dict[str, Any], code: int | None, seconds: float) -> Outcome:
    """Put together what a process said of one import, and how it ended if it did not say that."""
    if "facts" in heard:
        return Outcome(heard["seconds"], facts=heard["facts"])
    where = "" if heard.get("at") in (name, None) else f"{heard['at']}: "
    reason = heard.get("error") or end_of(code, seconds)
    return Outcome(seconds, where + reason, timed_out="error" not in heard and code is None)


def end_of(code: int | None, seconds: float) -> str:
    """Say how a process ended that could not say it itself."""
    if code is None:
        return f"no end after {seconds:g} s"
    if code >= 0:
        return f"the process ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (f", {SIGNALS[name]}" if name in SIGNALS else "")
