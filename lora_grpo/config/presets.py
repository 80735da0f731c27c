"""Presets, and how a run's configuration is put together: preset, then file, then flags."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_grpo.config.files import OF_ONE_CALL, read_base, read_config_file, read_run
from lora_grpo.config.train_config import (
    END_SETTINGS,
    MEMORY_SETTINGS,
    REWARD_CALLS,
    TrainConfig,
    flag,
)
from lora_grpo.machine.hardware import find_gpu

Config = TypeVar("Config", bound=TrainConfig)

PRESETS: dict[str, dict[str, Any]] = {
    # No network, no GPU: a rate fit for 0.85M parameters, completions that never reach 64 tokens,
    # validation in seconds.
    "tiny": {
        "model": "tiny",
        "backend": "transformers",
        "dataset": "arithmetic",
        "bnb_4bit_use_double_quant": False,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "max_prompt_length": 160,
        "max_completion_length": 64,
        "per_device_train_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "max_steps": 40,
        "eval_steps": 10,
        "eval_batch_size": 256,
        "save_steps": 5,
        "num_validation_items": 256,
    },
    # Small enough for a CPU to show ten steps of the real thing; completions cut to what it writes
    # before it rambles.
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "load_in_4bit": False,
        "learning_rate": 3e-5,
        "max_completion_length": 256,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "save_steps": 5,
    },
    # The main job, meant for 54.3 strict on GSM8K's test in under an hour on a 24 GB card. 512
    # tokens, since the run that got there cut off 43 % of its answers; 2,000 problems, since a
    # third of the data at G = 8 is what an hour holds; what does not fit, the memory plan shrinks.
    "qwen2.5-0.5b": {"gradient_checkpointing": True},
    # Larger models move further at the same rate, so half of it; micro-batches of 4.
    "qwen2.5-1.5b": {
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "learning_rate": 1e-5,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 16,
    },
    "qwen2.5-3b": {
        "model": "Qwen/Qwen2.5-3B-Instruct",
        "learning_rate": 5e-6,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 32,
    },
    # Answers without its own thinking, which would fill 512 tokens before the first tag.
    "qwen3-0.6b": {
        "model": "Qwen/Qwen3-0.6B",
        "learning_rate": 1e-5,
        "gradient_checkpointing": True,
    },
}
# Settings of a preset that hold only for its own dataset.
LIMITS_OF_DATA = ("max_prompt_length", "num_validation_items")
NEEDS_GPU = frozenset({"qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen3-0.6b"})
# What a resumed run may change: its output, its length, and how memory is used.
FREE_AT_RESUME = frozenset(
    {"resume", "max_steps", *OF_ONE_CALL, *END_SETTINGS, *MEMORY_SETTINGS, *REWARD_CALLS},
) | {"report_to"}
# Paths whose contents the record knows by their hash or text; the paths themselves may change.
LOCATIONS = frozenset(
    {"model", "adapter", "dataset", "eval_dataset", "system_prompt_file", "task_file"}
)

# Schedules whose every rate depends on the number of steps.
FALLING = ("linear", "cosine")


def why_not_longer(config: TrainConfig) -> str | None:
    """Return why the steps made would be others in a longer run, or None if they would not."""
    if config.lr_scheduler_type in FALLING:
        return f"--lr-scheduler-type {config.lr_scheduler_type} sets every rate by the last step"
    if config.curriculum:
        return "--curriculum spreads the problems from easy to hard over all steps"
    return None


def choose_preset() -> tuple[str, str]:
    """Return the preset for this machine, and why."""
    if find_gpu() is not None:
        return "qwen2.5-0.5b", "this machine has an NVIDIA GPU"
    return "tiny", "this machine has no NVIDIA GPU"


def find_sources(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags that decide the defaults of all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "resume", "model", "adapter", "dataset"):
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(arguments)[0]


def defaults_for(sources: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the defaults and a sentence about where they come from."""
    if sources.resume:
        if sources.config:
            raise ValueError(
                f"--resume {sources.resume} takes the settings of that run: leave out --config"
            )
        # vLLM's memory is planned anew, for the card as it is now.
        planned = {"vllm_gpu_memory_utilization": None, "vllm_max_num_seqs": None}
        settings = read_run(Path(sources.resume)) | planned
        return settings, f"as the run in {sources.resume} began"
    settings = read_config_file(Path(sources.config)) if sources.config else {}
    preset = sources.preset or settings.get("preset")
    base = {}
    if sources.adapter and not (sources.preset or sources.model or sources.config):
        base = read_base(Path(sources.adapter).expanduser())
    if preset in PRESETS:
        why = f"preset {preset}: {'asked for' if sources.preset else f'from {sources.config}'}"
    elif sources.preset or sources.model or settings.keys() & {"preset", "model"}:
        given = next(name for name in ("preset", "model", "config") if getattr(sources, name))
        preset, why = None, f"no preset: --{given} was given"
    elif base:
        preset, why = None, f"no preset: {base['model']} is the base of --adapter {sources.adapter}"
    else:
        preset, reason = choose_preset()
        why = f"preset {preset}: {reason}"
        if sources.config:
            why += f", and {sources.config} names neither preset nor model"
    chosen = preset_settings(preset, sources.dataset or settings.get("dataset"))
    return {**chosen, **base, **settings, "preset": preset}, why


def preset_settings(preset: str | None, dataset: str | None) -> dict[str, Any]:
    """Return a preset's settings, without its limits on data where another dataset is given."""
    settings = PRESETS.get(preset, {})
    if dataset in (None, settings.get("dataset", TrainConfig.dataset)):
        return settings
    return {name: value for name, value in settings.items() if name not in LIMITS_OF_DATA}


def without_checks(settings: dict[str, Any], kind: type[Config] = TrainConfig) -> Config:
    """Return a configuration that is not checked yet, because flags will still change it."""
    config = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(config, field.name, settings.get(field.name, field.default))
    return config


def absolute(name: str) -> str:
    """Return the absolute path if it exists, for runs from other folders, else the name."""
    path = Path(name).expanduser()
    return name if name in ("tiny", "arithmetic") or not path.exists() else str(path.resolve())


def keep_last(specs: Iterable[str], moved: bool = False) -> tuple[str, ...]:
    """Return the last `name=value` of each name, so that a flag overrides a file's.

    The path in `path:name=value` is part of the name, unless the file may have moved.
    """
    by_name = {}
    for spec in specs:
        path, _, call = spec.rpartition(":")
        by_name["" if moved else path, call.partition("=")[0]] = spec
    return tuple(by_name.values())


def absolute_reward(spec: str) -> str:
    path, colon, call = spec.rpartition(":")
    return f"{absolute(path)}:{call}" if path and colon else spec


def resolve_flags(config: Config) -> Config:
    """Make local paths absolute and let repeated flags override by name."""
    prompt, task = config.system_prompt_file, config.task_file
    return dataclasses.replace(
        config,
        model=absolute(config.model),
        adapter=config.adapter and absolute(config.adapter),
        dataset=absolute(config.dataset),
        eval_dataset=config.eval_dataset and absolute(config.eval_dataset),
        system_prompt_file=prompt and Path(absolute(str(prompt))),
        task_file=task and Path(absolute(str(task))),
        reward=keep_last(map(absolute_reward, config.reward), moved=config.resume is not None),
        reward_weight=keep_last(config.reward_weight),
    )


def check_resume(saved: TrainConfig, asked: TrainConfig) -> None:
    """Raise a ValueError if a resumed run changes a setting that its finished steps depended on."""
    before, now = (
        vars(config)
        | config.loss_settings
        | config.vllm_correction
        | {"reward": tuple(spec.rpartition(":")[2] for spec in config.reward)}
        for config in (saved, asked)
    )
    if saved.completions_per_step != asked.completions_per_step:
        raise ValueError(
            "--per-device-train-batch-size x --gradient-accumulation-steps was "
            f"{saved.per_device_train_batch_size} x {saved.gradient_accumulation_steps}, now "
            f"{asked.per_device_train_batch_size} x {asked.gradient_accumulation_steps}: a resumed "
            "run keeps their product"
        )
    changed = [
        f"{flag(field.name)} was {before[field.name]}, now {now[field.name]}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in FREE_AT_RESUME | LOCATIONS and before[field.name] != now[field.name]
    ]
    if changed:
        raise ValueError(
            f"--resume continues the same run, but {'; '.join(changed)}: leave them out, or "
            "start anew"
        )
    steps = f"--max-steps was {saved.max_steps}, now {asked.max_steps}"
    if asked.max_steps is None or asked.max_steps < saved.max_steps:
        raise ValueError(f"{steps}: a resumed run can only be prolonged")
    if saved.max_steps != asked.max_steps and (reason := why_not_longer(saved)):
        raise ValueError(f"{steps}: {reason}; start anew")


# What other tools, and older versions of TRL, call a setting.
OTHER_NAMES = {
    "learning_rate": ("lr", "actor_lr"),
    "r": ("lora_r", "lora_rank", "rank"),
    "lora_alpha": ("alpha",),
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "micro_batch_size"),
    "gradient_accumulation_steps": ("grad_accum", "accumulation_steps"),
    "num_train_epochs": ("epochs", "num_epochs"),
    "max_steps": ("steps", "num_steps", "max_train_steps"),
    "num_generations": ("group_size", "num_rollouts"),
    "beta": ("kl_coef", "kl_coeff"),
    "max_completion_length": ("max_tokens", "max_new_tokens", "max_response_length"),
    "adapters_dir": ("output_dir", "output"),
    "optim": ("optimizer", "optimiser"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "model": ("model_name_or_path",),
    "dataset": ("dataset_name",),
    "vllm_importance_sampling_clip_max": ("vllm_importance_sampling_cap",),
}


def refuse_other_names(arguments: Sequence[str]) -> None:
    """Raise a ValueError for a flag by which another tool calls one of these settings."""
    known = {flag(name): setting for setting, names in OTHER_NAMES.items() for name in names}
    for argument in arguments:
        typed = argument.partition("=")[0]
        if setting := known.get(typed.replace("_", "-")):
            raise ValueError(f"{typed} is not a flag: perhaps you meant {flag(setting)}")


def parse_train_config(
    arguments: Sequence[str] | None = None, kind: type[Config] = TrainConfig
) -> tuple[Config, str]:
    """Return the resolved configuration of a command line, and where its defaults come from.

    `kind` is `TrainConfig` or a subclass with a script's own flags.

    Raises:
        FileNotFoundError, ValueError: `--config` or `--resume` cannot be read, or a resumed run
        changes a setting.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    refuse_other_names(arguments)
    settings, why = defaults_for(find_sources(arguments))
    default = without_checks(settings, kind)
    config = resolve_flags(tyro.cli(kind, default=default, args=arguments))
    if config.resume:
        check_resume(default, config)
    return config, why
