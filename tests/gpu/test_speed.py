"""Seconds per step and tokens per second of every system on the same work, one after another.

4 prompts x 8 completions of up to 256 tokens per step, Qwen2.5-0.5B's shape in 4-bit, random
weights: nearly every completion reaches the limit, so the work is the same to within a few early
ends. `GPU_SPEED=unsloth-vllm,trl-vllm` chooses systems. A step is timed from its start to its end:
sync, sampling, rewards, update; the first step, which compiles and captures, is left out.
"""

import json
import os
from pathlib import Path
from statistics import mean, median

import pytest
from gpu_machine import (
    HERE,
    ON_CPU,
    SCRIPTS,
    SHAPE,
    VARIED,
    dataset,
    model_folder,
    run,
    small_model,
)
from trained_runs import merge

from lora_grpo.machine.files import read_json, read_jsonl

SECONDS, STEPS = 900, 6
OURS, TRL = SCRIPTS / "train_lora.py", HERE / "plain_trl.py"
# Backend (trl: plain TRL), rollout, type of the base where it is not 4-bit; in order of value.
SYSTEMS = (
    *("unsloth-vllm", "transformers-vllm", "trl-vllm", "transformers-generate", "trl-vllm-16bit"),
    *("transformers-vllm-16bit", "unsloth-generate", "trl-generate"),
)
CHOSEN = os.environ.get("GPU_SPEED", ",".join(SYSTEMS)).split(",")
WORK = (
    *("--max-steps", STEPS, "--save-steps", STEPS, "--num-generations", 8),
    *("--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 4),
    *("--max-completion-length", 256, "--num-eval-items", 2, "--num-validation-items", 0),
    *("--reward", VARIED),
)
ON_A_CPU = ("--max-steps", 2, "--max-completion-length", 24, "--gradient-accumulation-steps", 1)
COMPLETIONS = 8 if ON_CPU else 32


def needs(system: str) -> pytest.MarkDecorator:
    names = [name for name in ("unsloth", "vllm") if name in system]
    return pytest.mark.needs(*names, *([] if ON_CPU else [SHAPE]))


def work(system: str) -> tuple:
    """Return the flags of a system's work; on a CPU a little of it, to test this file."""
    backend, rollout, *whole = system.split("-")
    backend = "transformers" if backend == "trl" else backend
    flags = ("--backend", backend, "--rollout", rollout, *["--no-load-in-4bit" for _ in whole])
    if ON_CPU:
        return (*small_model(), *WORK, *ON_A_CPU, *flags)
    shape = ("--model", model_folder(SHAPE), "--dataset", dataset())
    return ("--preset", "qwen2.5-0.5b", *shape, *WORK, *flags)


def read_kept(out: Path) -> dict:
    """Return the figures of the systems that were timed into this folder."""
    path = out / "speed.json"
    return read_json(path) if path.exists() else {}


@pytest.mark.parametrize("system", [pytest.param(name, marks=needs(name)) for name in CHOSEN])
def test_step_time(out, figure, tmp_path, system: str) -> None:
    script = TRL if system.startswith("trl") else OURS
    flags = (*work(system), "--adapters-dir", tmp_path, "--run-name", system)
    try:
        run(out / "logs" / f"speed-{system}.log", SECONDS, script, *flags)
    except AssertionError as error:
        if script != TRL:
            raise
        reason = str(error).strip().splitlines()[-1]
        figure(f"speed, {system}: does not run", reason)
        pytest.xfail(f"plain TRL does not do this work: {reason}")
    rows = read_jsonl(tmp_path / system / "metrics.jsonl")[1:]
    found = {
        "seconds": median(row["seconds"] for row in rows),
        "tokens_per_second": median(
            COMPLETIONS * row["completion_length"] / row["seconds"] for row in rows
        ),
        "completion_length": mean(row["completion_length"] for row in rows),
        "all_seconds": [row["seconds"] for row in rows],
    }
    kept = read_kept(out) | {system: found}
    (out / "speed.json").write_text(json.dumps(kept, indent=2), encoding="utf-8")
    figure(f"speed, {system}: median step", found["seconds"], "s")
    figure(f"speed, {system}: trained tokens", found["tokens_per_second"], "tokens/s")
    report = merge(out, tmp_path / system, f"speed-{system}-{os.getpid()}")
    assert report["passed"] and max(row["grad_norm"] for row in rows) > 0


def test_how_many_times_faster_than_plain_trl(out, figure) -> None:
    kept = read_kept(out)
    compared = [name for name in kept if name.startswith("trl")]
    if not compared:
        pytest.skip("plain TRL was not timed, so there is nothing to compare with")
    for trl in compared:
        for system in kept.keys() - set(compared):
            times = kept[trl]["seconds"] / kept[system]["seconds"]
            figure(f"speed, {system} against {trl}", times, "x")
