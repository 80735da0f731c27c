"""Short runs by `scripts/train_lora.py`, one per backend, rollout and type; each is made once.

What a run must have left behind is checked in one place, the same for every backend.
"""

import math
from pathlib import Path
from typing import Any

from gpu_machine import ON_CPU, SCRIPTS, VARIED, run, small_model

from lora_grpo.machine.files import read_json, read_jsonl

STEPS, STEPS_IN_FLOAT16 = 3, 8  # a loss scale that is too large costs float16 its first updates
RUN_SECONDS = 900
FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
    *("completions.jsonl", "curves.png", "eval.json", "eval_items.jsonl", "metrics.jsonl"),
    *("report.html", "tokenizer.json", "tokenizer_config.json", "train_config.json"),
    "validation.jsonl",
}
SMALL_RUN = (
    *("--num-generations", 4, "--per-device-train-batch-size", 4),
    *("--gradient-accumulation-steps", 2, "--max-completion-length", 64),
    *("--num-eval-items", 16, "--num-validation-items", 8, "--log-completions-steps", 1),
    *("--learning-rate", 1e-4, "--load-in-4bit", "--reward", VARIED),
)
# Named for backend, rollout and type, where these are not transformers and bfloat16.
KINDS = ("generate", "generate-float16", "vllm", "vllm-float16", "unsloth-generate", "unsloth-vllm")


def backend_and_rollout(kind: str) -> tuple[str, str]:
    """Return what a kind of run is named for."""
    backend = "unsloth" if "unsloth" in kind else "transformers"
    return backend, "vllm" if "vllm" in kind else "generate"


def steps_of(kind: str) -> int:
    """Return the updates that a kind of run makes."""
    return STEPS_IN_FLOAT16 if "float16" in kind else STEPS


def clear_way(directory: Path) -> None:
    """Put aside what a run that failed has left, since a run never overwrites another."""
    if directory.exists():
        taken = len(list(directory.parent.glob(f"{directory.name}.failed-*")))
        directory.rename(directory.with_name(f"{directory.name}.failed-{taken + 1}"))


def train(out: Path, kind: str) -> Path:
    """Return the adapter directory of a kind of run, trained now unless it is there already."""
    directory = out / "adapters" / kind
    if not (directory / "eval.json").is_file():
        clear_way(directory)
        backend, rollout = backend_and_rollout(kind)
        flags = (*small_model(), *SMALL_RUN, "--backend", backend, "--rollout", rollout)
        flags += ("--dtype", "float16") if "float16" in kind else ()
        for name in ("--max-steps", "--eval-steps", "--save-steps"):
            flags += (name, steps_of(kind))
        flags += ("--run-name", kind, "--adapters-dir", directory.parent)
        run(out / "logs" / f"train-{kind}.log", RUN_SECONDS, SCRIPTS / "train_lora.py", *flags)
    return directory


def merge(out: Path, directory: Path, name: str) -> dict[str, Any]:
    """Merge an adapter into its base, compare their logits, and return the report."""
    target, log = out / "merged" / name, out / "logs" / f"merge-{name}.log"
    if not target.exists():
        flags = ("--output-dir", target, "--num-prompts", 4, "--proof", "logits")
        run(log, RUN_SECONDS, SCRIPTS / "merge_adapter.py", directory, *flags)
    return read_json(target / "merge_report.json")


def check_run(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Check what a run left behind, whichever backend made it, and return its metrics."""
    left = {path.name for path in directory.iterdir() if path.is_file()}
    assert left == FILES, f"missing {FILES - left}, unexpected {left - FILES}"
    rows = read_jsonl(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps_of(kind) + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)
    moved = [row["grad_norm"] for row in rows if row["grad_norm"] is not None]
    assert moved and max(moved) > 0, "no step had a finite gradient above 0"
    record = read_json(directory / "train_config.json")
    assert (record["backend"], record["rollout"]) == backend_and_rollout(kind)
    assert record["load_in_4bit"] is True and record["bnb_4bit_quant_type"] == "nf4"
    if not ON_CPU:
        assert not record["device"].startswith("cpu")
        assert record["dtype"] == "float16" or "float16" not in kind
    report = read_json(directory / "eval.json")
    assert report["num_items"] == 16 and {"base", "adapter"} <= report.keys()
    assert read_json(directory / "adapter_config.json")["base_model_name_or_path"]
    return rows
