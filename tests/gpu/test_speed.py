"""Seconds a step and tokens a second of every system on the same work, one after another.

4 prompts x 8 completions of up to 256 tokens a step, Qwen2.5-0.5B's shape in 4-bit, random weights:
nearly every completion reaches the limit, so the work is the same to within its few early ends.
`GPU_SPEED=unsloth-vllm,trl-vllm` chooses systems. A second is one between the start and the end of
a step: sync, sampling, rewards, update; the first step, which compiles and captures, is left out.
"""

import json
import os
import statistics
from pathlib import Path

import pytest
from gpu_machine import (
    HERE,
    ON_CPU,
    ROOT,
    SHAPE,
    VARIED,
    dataset,
    model_folder,
    read_json,
    read_rows,
    run,
    small_model,
)
from trained_runs import merge

SECONDS, STEPS = 900, 6
OURS, TRL = ROOT / "scripts" / "train_lora.py", HERE / "plain_trl.py"
VLLM, GENERATE = ("--rollout", "vllm"), ("--rollout", "generate")
UNSLOTH, TRANSFORMERS = ("--backend", "unsloth"), ("--backend", "transformers")
WHOLE = ("--no-load-in-4bit",)
SYSTEMS: dict[str, tuple[Path, tuple[str, ...]]] = {
    "unsloth-vllm": (OURS, UNSLOTH + VLLM),
    "transformers-vllm": (OURS, TRANSFORMERS + VLLM),
    "trl-vllm": (TRL, TRANSFORMERS + VLLM),
    "transformers-generate": (OURS, TRANSFORMERS + GENERATE),
    "trl-vllm-16bit": (TRL, TRANSFORMERS + VLLM + WHOLE),
    "transformers-vllm-16bit": (OURS, TRANSFORMERS + VLLM + WHOLE),
    "unsloth-generate": (OURS, UNSLOTH + GENERATE),
    "trl-generate": (TRL, TRANSFORMERS + GENERATE),
}
CHOSEN = os.environ.get("GPU_SPEED", ",".join(SYSTEMS)).split(",")
WORK = (
    *("--max-steps", STEPS, "--save-steps", STEPS, "--num-generations", 8),
    *("--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 4),
    *("--max-completion-length", 256, "--num-eval-items", 2, "--num-validation-items", 0),
    *("--reward", VARIED),
)
ON_A_CPU = ("--max-steps", 2, "--max-completion-length", 24, "--gradient-accumulation-steps", 1)
COMPLETIONS = 32
COMPARED = {"trl-vllm": "4-bit", "trl-vllm-16bit": "16-bit", "trl-generate": "generate"}


def needs(system: str) -> pytest.MarkDecorator:
    names = [name for name in ("unsloth", "vllm") if name in system]
    return pytest.mark.needs(*names, *([] if ON_CPU else [SHAPE]))


def work() -> tuple:
    """Return the flags of the work; on a CPU a little of it, to prove this file."""
    if ON_CPU:
        return (*small_model(), *WORK, *ON_A_CPU)
    return (
        *("--preset", "qwen2.5-0.5b", "--model", model_folder(SHAPE), "--dataset", dataset()),
        *WORK,
    )


@pytest.mark.parametrize("system", [pytest.param(name, marks=needs(name)) for name in CHOSEN])
def test_step_time(out, figure, tmp_path, system: str) -> None:
    script, flags = SYSTEMS[system]
    where = ("--adapters-dir", tmp_path, "--run-name", system)
    try:
        run(out / "logs" / f"speed-{system}.log", SECONDS, script, *work(), *flags, *where)
    except AssertionError as error:
        if script != TRL:
            raise
        reason = str(error).strip().splitlines()[-1]
        figure(f"speed, {system}: does not run", reason)
        pytest.xfail(f"plain TRL does not do this work: {reason}")
    rows = read_rows(tmp_path / system / "metrics.jsonl")[1:]
    seconds = statistics.median(row["seconds"] for row in rows)
    count = 8 if ON_CPU else COMPLETIONS
    rates = [count * row["completion_length"] / row["seconds"] for row in rows]
    found = {
        "seconds": seconds,
        "tokens_per_second": statistics.median(rates),
        "completion_length": statistics.mean(row["completion_length"] for row in rows),
        "all_seconds": [row["seconds"] for row in rows],
        "learned": max(row["grad_norm"] for row in rows) > 0,
    }
    path = out / "speed.json"
    kept = read_json(path) if path.exists() else {}
    path.write_text(json.dumps(kept | {system: found}, indent=2), encoding="utf-8")
    figure(f"speed, {system}: median step", seconds, "s")
    figure(f"speed, {system}: trained tokens", found["tokens_per_second"], "tokens/s")
    report = merge(out, tmp_path / system, f"speed-{system}-{os.getpid()}")
    assert report["passed"] and found["learned"]


def test_how_many_times_faster_than_plain_trl(out, figure) -> None:
    path = out / "speed.json"
    kept = read_json(path) if path.exists() else {}
    compared = [name for name in COMPARED if name in kept]
    if not compared:
        pytest.skip("plain TRL was not timed, so there is nothing to compare with")
    for trl in compared:
        for system, found in kept.items():
            if not system.startswith("trl"):
                figure(
                    f"speed, {system} against {trl}", kept[trl]["seconds"] / found["seconds"], "x"
                )
