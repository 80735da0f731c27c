"""Qwen2.5-0.5B's shape trains on cards of 6, 8 and 12 GB, and holds what the plan said.

`GPU_CAP_GB=6,8` chooses other sizes. On a larger card another process holds the rest.
"""

import os

import pytest
from gpu_machine import GIB, HERE, SHAPE, VARIED, dataset, model_folder, read_json, read_rows, run

SIZES = [int(size) for size in os.environ.get("GPU_CAP_GB", "6,8,12").split(",")]
SYSTEMS = {
    "transformers-generate": ("--backend", "transformers", "--rollout", "generate"),
    "unsloth-generate": ("--backend", "unsloth", "--rollout", "generate"),
    "transformers-vllm": ("--backend", "transformers", "--rollout", "vllm"),
    "unsloth-vllm": ("--backend", "unsloth", "--rollout", "vllm"),
}
SHORT = (*("--max-steps", 2, "--num-eval-items", 2, "--num-validation-items", 0),)
TOLERANCE = 1.15
SECONDS = 600


def cases() -> list:
    """Every system in the first size before any in the next."""
    return [
        pytest.param(
            size,
            system,
            id=f"{size}-{system}",
            marks=pytest.mark.needs(
                size, *(name for name in ("unsloth", "vllm") if name in system), SHAPE
            ),
        )
        for size in SIZES
        for system in SYSTEMS
    ]


@pytest.mark.parametrize(("size", "system"), cases())
def test_a_run_holds_what_was_planned(out, figure, tmp_path, size: int, system: str) -> None:
    output, log = out / f"memory-{size}-{system}.json", out / "logs" / f"memory-{size}-{system}.log"
    flags = ("--preset", "qwen2.5-0.5b", "--model", model_folder(SHAPE), "--dataset", dataset())
    flags += ("--gpu-memory", size, "--reward", VARIED, *SHORT, *SYSTEMS[system])
    flags += ("--adapters-dir", tmp_path, "--run-name", "capped")
    text = run(log, SECONDS, HERE / "capped.py", size, output, *flags)
    found = read_json(output)
    predicted, measured = found["predicted_bytes"], found["measured_bytes"]
    name = f"memory, {size} GB, {system}"
    figure(f"{name}: predicted", predicted / GIB, "GiB")
    figure(f"{name}: measured", measured / GIB, "GiB")
    assert len(read_rows(tmp_path / "capped" / "metrics.jsonl")) == 2
    assert "out of memory" not in text, "it only fitted after running out once"
    assert measured <= predicted * TOLERANCE
