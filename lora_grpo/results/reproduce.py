"""What a run was given: the settings for its card, and the command that makes the run again."""

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_grpo.config.files import given_settings
from lora_grpo.config.presets import PRESETS, preset_settings
from lora_grpo.config.train_config import TrainConfig, flag
from lora_grpo.results.records import short_name

SHOWN = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "load_in_4bit", "dtype"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
    *("max_completion_length", "temperature", "top_p", "dynamic_sampling_rounds", "loss_type"),
    *("importance_sampling_level", "epsilon", "epsilon_high", "beta", "scale_rewards"),
    *("num_iterations", "reward_set", "reward", "reward_weight", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "steps"),
    *("seed", "backend", "rollout", "device", "versions", "base_sha256", "dataset_sha256"),
]
# Names and places of the one run, how much it printed, and what its machine had room for.
OF_ONE_RUN = frozenset(
    {
        *("preset", "config", "resume", "run_name", "adapters_dir"),
        *("dry_run", "preview", "quiet"),
        *("gpu_memory", "vllm_gpu_memory_utilization", "vllm_max_num_seqs"),
    }
)


def hide_folder(spec: str) -> str:
    """Return a reward's `path/to/file.py:function=weight` without its folders."""
    path, _, call = spec.rpartition(":")
    return f"{Path(path).name}:{call}"


# What names a file or folder, and how it is published.
PUBLISHED: dict[str, Callable[[str], str]] = {
    "model": short_name,
    "dataset": short_name,
    "eval_dataset": short_name,
    "system_prompt_file": lambda path: Path(path).name,
    "reward": hide_folder,
}


def publish(name: str, value: Any) -> Any:
    """Return a recorded setting with its local paths cut to their last parts."""
    cut = PUBLISHED.get(name)
    if cut is None or value is None:
        return value
    return [cut(item) for item in value] if isinstance(value, list) else cut(value)


def has_local_paths(trained: dict[str, Any]) -> bool:
    return any(publish(name, trained.get(name)) != trained.get(name) for name in PUBLISHED)


def list_settings(trained: dict[str, Any]) -> dict[str, str]:
    """Return the recorded settings that decided the run, as text by their name."""
    hidden = () if trained.get("dynamic_sampling") else ("dynamic_sampling_rounds",)
    shown = {name: publish(name, trained.get(name)) for name in SHOWN if name not in hidden}
    texts = {name: describe_setting(value) for name, value in shown.items() if value is not None}
    return {name: text for name, text in texts.items() if text}


def describe_setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def reproduce(trained: dict[str, Any]) -> list[str]:
    """Return the command of a run, one flag per line: what differs from its preset or the
    defaults."""
    preset = trained.get("preset") if trained.get("preset") in PRESETS else None
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    defaults |= preset_settings(preset, trained.get("dataset"))
    lines = ["lora-grpo train", *([f"--preset {preset}"] if preset else [])]
    given = given_settings(trained)
    for name, default in defaults.items():
        value = publish(name, given.get(name, default))
        value = tuple(value) if isinstance(value, list) else value
        # Without a preset the hardware would choose one, unless a model is named.
        if name not in OF_ONE_RUN and (value != default or (name == "model" and not preset)):
            lines += write_flags(name, value)
    return lines


def write_flags(name: str, value: Any) -> list[str]:
    """Return a setting as it is typed."""
    if type(value) is bool and name != "init_lora_weights":
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    values = [shlex.quote(str(item)) for item in (value if isinstance(value, tuple) else (value,))]
    if name in ("reward", "reward_weight"):
        return [f"{flag(name)} {item}" for item in values]
    return [f"{flag(name)} {' '.join(values)}"]
