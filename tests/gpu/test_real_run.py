"""A real 1.5B model on GSM8K for as many steps as the time holds; 200 test items before and after.

`GPU_REAL_SECONDS` is the time for it all. A few steps are made and evaluated first, which is a
result already; their pace says how many more fit, and the run is resumed to make them.
"""

import os
import time
from pathlib import Path
from statistics import median

import pytest
from gpu_machine import ON_CPU, REAL, SCRIPTS, dataset, lacks, model_folder, run
from trained_runs import clear_way, merge

from lora_grpo.machine.files import read_json, read_jsonl

BUDGET = float(os.environ.get("GPU_REAL_SECONDS", "1500"))
FIRST, ITEMS = 4, int(os.environ.get("GPU_REAL_ITEMS", "200"))
MARGIN = 1.15
TRAIN = SCRIPTS / "train_lora.py"
ON_A_CPU = (
    *("--max-prompt-length", 160, "--max-completion-length", 32, "--num-generations", 4),
    *("--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 1),
)
RECIPE = (
    *("--num-eval-items", ITEMS, "--num-validation-items", 0, "--max-steps", FIRST),
    *("--save-steps", 10, "--log-completions-steps", 4),
    *(ON_A_CPU if ON_CPU else ("--preset", "qwen2.5-1.5b")),
)


def begin(out: Path, backend: str) -> Path:
    """Make the first steps by a backend, and return the adapter directory."""
    directory = out / "adapters" / f"real-{backend}"
    flags = ("--model", model_folder(REAL), "--dataset", dataset(), "--backend", backend, *RECIPE)
    flags += ("--run-name", directory.name, "--adapters-dir", directory.parent)
    if not (directory / "eval.json").is_file():
        clear_way(directory)
        run(out / "logs" / f"{directory.name}-first.log", BUDGET, TRAIN, *flags)
    return directory


def begin_with_what_works(out: Path, figure) -> Path:
    """Return the first backend's run that works: unsloth is the faster, transformers the safer."""
    if lacks("unsloth") is None:
        try:
            return begin(out, "unsloth")
        except AssertionError as error:
            figure("real: unsloth failed", str(error).splitlines()[0])
    return begin(out, "transformers")


def steps_that_fit(directory: Path, spent: float) -> int:
    """Return the steps that a resumed run can end with: its start and evaluation take as long."""
    seconds = [row["seconds"] for row in read_jsonl(directory / "metrics.jsonl")]
    around = max(spent - sum(seconds), 0)
    left = BUDGET - spent - around
    return FIRST + max(int(left / (median(seconds[1:]) * MARGIN)), 0)


@pytest.mark.needs(REAL)
def test_accuracy_before_and_after(out, figure) -> None:
    started = time.monotonic()
    directory = begin_with_what_works(out, figure)
    steps = steps_that_fit(directory, time.monotonic() - started)
    if steps > FIRST:
        log = out / "logs" / f"{directory.name}-rest.log"
        run(log, BUDGET, TRAIN, "--resume", directory, "--max-steps", steps)
    report, rows = read_json(directory / "eval.json"), read_jsonl(directory / "metrics.jsonl")
    figure("real: run", directory.name)
    figure("real: steps", len(rows))
    figure("real: median step", median(row["seconds"] for row in rows), "s")
    for model in ("base", "adapter"):
        for name in ("strict_accuracy", "lenient_accuracy", "format_rate", "truncated_rate"):
            figure(f"real: {model}, {name}", report[model][name])
    figure("real: McNemar's p", report["mcnemar_p"])
    assert report["num_items"] == ITEMS


@pytest.mark.needs(REAL)
def test_merge_of_the_real_run(out, figure) -> None:
    found = sorted(path.parent for path in out.glob("adapters/real-*/eval.json"))
    if not found:
        pytest.skip("the real model has not been trained into GPU_OUT")
    report = merge(out, found[0], found[0].name)
    figure("real: merge, mean KL", report["from_policy"]["mean_kl"], "nats per token")
    assert report["passed"]
