"""Qwen2.5-0.5B's shape trains on cards of 6, 8 and 12 GB, and holds what the plan said.

`GPU_CAP_GB=6,8` chooses other sizes. On a larger card another process holds the rest.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gpu_machine import GIB, SCRIPTS, SHAPE, VARIED, dataset, model_folder, run

from lora_grpo.machine.files import read_jsonl
from lora_grpo.machine.hardware import find_gpu

SIZES = [int(size) for size in os.environ.get("GPU_CAP_GB", "6,8,12").split(",")]
SYSTEMS = ("transformers-generate", "unsloth-generate", "transformers-vllm", "unsloth-vllm")
SHORT = ("--max-steps", 2, "--num-eval-items", 2, "--num-validation-items", 0)
TOLERANCE = 1.15
SECONDS = 600
CONTEXT = GIB  # what the holding process itself may take
HOLD = """
import sys, torch
take = torch.cuda.mem_get_info()[0] - int(sys.argv[1])
held = torch.empty(take, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def small_card(size: int) -> Iterator[None]:
    """Hold all but `size` bytes of the card while the block runs; a card without more than that
    free is left as it is."""
    if find_gpu().free_bytes <= size + CONTEXT:
        yield
        return
    command = [sys.executable, "-c", HOLD, str(size)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:  # ends when its input does
        assert holder.stdout.readline() == "held\n", "the rest of the card could not be held"
        yield


# Every system in the first size before any in the next.
CASES = [
    pytest.param(size, system, marks=pytest.mark.needs(size, SHAPE, *needs))
    for size in SIZES
    for system in SYSTEMS
    for needs in [[name for name in ("unsloth", "vllm") if name in system]]
]


@pytest.mark.parametrize(("size", "system"), CASES)
def test_a_run_holds_what_was_planned(out, figure, tmp_path, size: int, system: str) -> None:
    log = out / "logs" / f"memory-{size}-{system}.log"
    backend, rollout = system.split("-")
    flags = ("--preset", "qwen2.5-0.5b", "--model", model_folder(SHAPE), "--dataset", dataset())
    flags += ("--gpu-memory", size, "--reward", VARIED, *SHORT)
    flags += ("--backend", backend, "--rollout", rollout)
    flags += ("--adapters-dir", tmp_path, "--run-name", "capped")
    with small_card(size * GIB):
        text = run(log, SECONDS, SCRIPTS / "train_lora.py", *flags)
    rows = read_jsonl(tmp_path / "capped" / "metrics.jsonl")
    predicted, measured = (
        rows[-1][name] for name in ("predicted_memory_bytes", "peak_memory_bytes")
    )
    figure(f"memory, {size} GB, {system}: predicted", predicted / GIB, "GiB")
    figure(f"memory, {size} GB, {system}: measured", measured / GIB, "GiB")
    assert len(rows) == 2
    assert "out of memory" not in text, "it only fitted after running out once"
    assert measured <= predicted * TOLERANCE
