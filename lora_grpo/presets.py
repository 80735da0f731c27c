"""Tested sets of defaults, and how a run's configuration is put together: preset, file, flags."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_grpo.config import TrainConfig, flag

PRESETS: dict[str, dict[str, Any]] = {
    # No network, no GPU: a rate fit for 0.85M parameters, completions that never reach 64 tokens,
    # validation in seconds.
    "tiny": {
        "model": "tiny",
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
        "max_steps": 30,
        "eval_steps": 10,
        "eval_batch_size": 256,
        "save_steps": 5,
        "num_validation_items": 128,
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
    # The main job: 8 prompts x 8 completions a step, in micro-batches that leave room on a 6 GB
    # card.
    "qwen2.5-0.5b": {"gradient_checkpointing": True},
}
FREE_AT_RESUME = frozenset(
    {"resume", "config", "quiet", "dry_run", "preview", "max_steps", "adapters_dir", "run_name"}
)


def has_nvidia_gpu() -> bool:
    """Tell whether the driver lists a GPU, without loading torch."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def choose_preset() -> tuple[str, str]:
    """Return the preset for this machine, and why."""
    if has_nvidia_gpu():
        return "qwen2.5-0.5b", "this machine has an NVIDIA GPU"
    return "tiny", "this machine has no NVIDIA GPU"


def coerce(name: str, value: Any) -> Any:
    """Turn a JSON or YAML value into the field's type where that is a path or a tuple."""
    hint = typing.get_type_hints(TrainConfig)[name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is not None and Path in options:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def read_knobs(path: Path) -> dict[str, Any]:
    """Return the knobs of a saved `train_config.json` (which records more than knobs) or of a YAML
    file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken text, or a YAML key that is no knob.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--config {path} does not exist: give a train_config.json or a YAML file"
        )
    text = path.read_text(encoding="utf-8")
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    if path.suffix == ".json":
        values = parse_json(path, text)
    else:
        values = parse_yaml(path, text)
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(
                f"--config {path}: unknown key {', '.join(unknown)}: see --help for the knobs"
            )
    return {name: coerce(name, value) for name, value in values.items() if name in names}


def parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--config {path}, line {error.lineno}: broken JSON ({error.msg})"
        ) from None


def parse_yaml(path: Path, text: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"--config {path} is broken YAML: {str(error).splitlines()[-1].strip()}"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {path} must hold knobs as `name: value` lines, got {type(values).__name__}"
        )
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def find_sources(arguments: Sequence[str]) -> argparse.Namespace:
    """Look ahead for the flags that decide the defaults of all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "resume", "model"):
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(
        [argument for argument in arguments if argument not in ("-h", "--help")]
    )[0]


def defaults_for(sources: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the defaults that the sources give, and a sentence that says where they come from."""
    if sources.resume:
        return read_knobs(
            Path(sources.resume) / "train_config.json"
        ), f"as the run in {sources.resume} began"
    knobs = read_knobs(Path(sources.config)) if sources.config else {}
    preset = sources.preset or knobs.get("preset")
    if preset in PRESETS:
        why = f"preset {preset}: {'from ' + sources.config if not sources.preset else 'asked for'}"
    elif sources.config or sources.model:
        preset, why = None, f"no preset: {'--config' if sources.config else '--model'} was given"
    else:
        preset, reason = choose_preset()
        why = f"preset {preset}: {reason}"
    return {**PRESETS.get(preset, {}), **knobs, "preset": preset}, why


def anchor_paths(config: TrainConfig) -> TrainConfig:
    """Make the local paths that a run must find again absolute, so that it can be resumed from
    anywhere."""
    named = {
        name: getattr(config, name)
        for name in ("model", "dataset", "eval_dataset", "system_prompt_file")
    }
    found = {name: Path(value).expanduser() for name, value in named.items() if value is not None}
    return dataclasses.replace(
        config,
        **{
            name: type(named[name])(path.resolve())
            if name == "system_prompt_file"
            else str(path.resolve())
            for name, path in found.items()
            if path.exists() and named[name] not in ("tiny", "arithmetic")
        },
    )


def check_resume(saved: TrainConfig, asked: TrainConfig) -> None:
    """Refuse a resume that changes a knob which the finished steps depended on."""
    changed = [
        f"{flag(field.name)} was {getattr(saved, field.name)}, now {getattr(asked, field.name)}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in FREE_AT_RESUME
        and getattr(saved, field.name) != getattr(asked, field.name)
    ]
    if changed:
        raise ValueError(
            f"--resume goes on with the same run, but {'; '.join(changed)}: leave them out, or "
            "start anew"
        )
    if saved.max_steps and asked.max_steps and asked.max_steps < saved.max_steps:
        raise ValueError(
            f"--max-steps was {saved.max_steps}, now {asked.max_steps}: a resumed run can only be "
            "prolonged"
        )
    if saved.max_steps != asked.max_steps and saved.lr_scheduler_type in ("linear", "cosine"):
        raise ValueError(
            f"--max-steps was {saved.max_steps}, now {asked.max_steps}: with --lr-scheduler-type "
            f"{saved.lr_scheduler_type} that changes the rate of the steps already made; start anew"
        )


def parse_train_config(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, str]:
    """Return the resolved configuration of a command line, and where its defaults come from.

    Raises:
        FileNotFoundError, ValueError: a `--config` or `--resume` that cannot be read, or a changed
        knob at resume.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    knobs, why = defaults_for(find_sources(arguments))
    default = TrainConfig(**knobs)
    config = anchor_paths(tyro.cli(TrainConfig, default=default, args=arguments))
    if config.resume:
        check_resume(default, config)
    return config, why
