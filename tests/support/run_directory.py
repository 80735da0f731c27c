"""What of a run's directory must be the same however often the run was stopped: all but what a
clock or a memory gauge said."""

import json
from pathlib import Path
from typing import Any

MEASURED = (
    *("seconds", "seconds_generate", "seconds_sync", "seconds_reward", "seconds_update"),
    *("seconds_other", "elapsed_seconds", "tokens_per_second_generate", "tokens_per_second_update"),
    *("peak_memory_bytes", "predicted_memory_bytes"),
)
ROWS = ("metrics.jsonl", "completions.jsonl", "validation.jsonl", "eval_items.jsonl")
WEIGHTS = ("adapter_model.safetensors", "last/adapter_model.safetensors")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return a file's rows without what was measured."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def contents(run_dir: Path) -> dict[str, Any]:
    """Return all that a run must end up with, whatever happened on the way."""
    return {
        **{name: read_rows(run_dir / name) for name in ROWS},
        **{name: (run_dir / name).read_bytes() for name in WEIGHTS},
        "eval.json": json.loads((run_dir / "eval.json").read_text()),
        "card": (run_dir / "README.md").read_text(),
        **start_of(run_dir / "start"),
        "leftovers": sorted(path.name for path in run_dir.glob(".*")),
        "checkpoints": sorted(path.name for path in run_dir.glob("checkpoint-*")),
    }


def start_of(folder: Path) -> dict[str, Any]:
    """Return what GRPO started from, where that is not a fresh adapter."""
    if not folder.is_dir():
        return {}
    found: dict[str, Any] = {"start": sorted(path.name for path in folder.iterdir())}
    found["start/weights"] = (folder / "adapter_model.safetensors").read_bytes()
    if (folder / "metrics.jsonl").is_file():
        found["start/metrics.jsonl"] = read_rows(folder / "metrics.jsonl")
    return found
