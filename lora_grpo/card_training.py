"""A card's sections on the run: its settings, and the command that makes it again."""

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from string import Formatter
from typing import Any

from lora_grpo.card_base import short_name
from lora_grpo.card_markdown import code, escape, fence, table
from lora_grpo.card_records import Records
from lora_grpo.config import TrainConfig, flag
from lora_grpo.config_file import given_knobs
from lora_grpo.presets import PRESETS, preset_knobs

SETTINGS = {
    "adapter": "LoRA r {r}, alpha {lora_alpha}, dropout {lora_dropout:g}",
    "adapted": "{adapted}",
    "base held in": "{held_in}",
    "sampling": "{num_generations} completions a prompt, {completions} a step, up to "
    "{max_completion_length} tokens, temperature {temperature:g}, top-p {top_p:g}",
    "loss": "{loss_type}",
    "importance ratio by": "{importance_sampling_level}",
    "clipped below by": "{epsilon:g}",
    "clipped above by": "{epsilon_high:g}",
    "groups without a signal": "{replaced}",
    "KL weight": "{beta:g}",
    "advantages divided by the spread of": "{scale_rewards}",
    "updates a batch": "{num_iterations}",
    "rewards": "{rewards}",
    "learning rate": "{learning_rate:g}, {lr_scheduler_type}, warm-up over {warmup_steps} steps",
    "optimiser": "{optim}, weight decay {weight_decay:g}, gradient norm up to {max_grad_norm:g}",
    "steps": "{steps}",
    "seed": "{seed}",
    "loaded by, sampled by": "{backend}, {rollout}",
    "device": "{device}",
    "versions": "{packages}",
    "base's weights, sha256": "{base_sha256}",
    "data, sha256": "{dataset_sha256}",
}
# Names and places of the one run, how much it printed, and what its machine had room for.
OF_ONE_RUN = frozenset(
    {
        *("preset", "config", "resume", "run_name", "adapters_dir"),
        *("dry_run", "preview", "quiet"),
        *("gpu_memory", "vllm_gpu_memory_utilization", "vllm_max_num_seqs"),
    }
)


def write_settings(records: Records) -> str | None:
    """Return the recorded settings as a table, or None where there is no record."""
    trained = records.trained
    if not trained:
        return None
    everything = {**trained, **derive(trained)}
    known = {name: value for name, value in everything.items() if value is not None}
    rows = [
        (label, escape(template.format_map(known)))
        for label, template in SETTINGS.items()
        if {name for _, name, _, _ in Formatter().parse(template) if name} <= known.keys()
    ]
    return table(("setting", "value"), rows) + "\n\nEvery setting is in `train_config.json`."


def derive(trained: dict[str, Any]) -> dict[str, Any]:
    """Return what the settings come to, None for what the record does not tell."""
    sizes = (trained.get("per_device_train_batch_size"), trained.get("gradient_accumulation_steps"))
    held_in = "4-bit NF4" if trained.get("load_in_4bit") else trained.get("dtype")
    versions = trained.get("versions", {})
    weights = trained.get("reward_weight") or []
    rounds = trained.get("dynamic_sampling_rounds") if trained.get("dynamic_sampling") else None
    named = [trained.get("reward_set"), *map(hide_folder, trained.get("reward") or []), *weights]
    return {
        "adapted": ", ".join(trained.get("target_modules", [])) or None,
        "completions": sizes[0] * sizes[1] if all(sizes) else None,
        "held_in": held_in,
        "packages": ", ".join(f"{name} {found}" for name, found in versions.items() if found)
        or None,
        "replaced": f"replaced by other prompts in up to {rounds} rounds a step"
        if rounds
        else None,
        "rewards": ", ".join(name for name in named if name) or None,
    }


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
    """Return a knob's recorded value with its local paths cut to their last parts."""
    cut = PUBLISHED.get(name)
    if cut is None or value is None:
        return value
    return [cut(item) for item in value] if isinstance(value, list) else cut(value)


def write_command(records: Records) -> str | None:
    """Return the section on how to make the run again, or None where there is no record."""
    trained = records.trained
    if "steps" not in trained:
        return None
    commit = trained.get("git_commit")
    at = f" at commit {code(commit)}" if commit else ""
    parts = [f"With lora-grpo{at}:", fence(" \\\n  ".join(reproduce(trained)), "bash")]
    if any(publish(name, trained.get(name)) != trained.get(name) for name in PUBLISHED):
        parts.append("Files and folders go by the last part of their path: give your own.")
    return "\n\n".join(parts)


def reproduce(trained: dict[str, Any]) -> list[str]:
    """Return the command of a run, a flag a line: what differs from its preset or the defaults."""
    preset = trained.get("preset") if trained.get("preset") in PRESETS else None
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    defaults |= preset_knobs(preset, trained.get("dataset"))
    lines = ["python scripts/train_lora.py", *([f"--preset {preset}"] if preset else [])]
    given = given_knobs(trained)
    for name, default in defaults.items():
        value = publish(name, given.get(name, default))
        value = tuple(value) if isinstance(value, list) else value
        # Without a preset the hardware would choose one, unless a model is named.
        if name not in OF_ONE_RUN and (value != default or (name == "model" and not preset)):
            lines += write_flags(name, value)
    return lines


def write_flags(name: str, value: Any) -> list[str]:
    """Return a knob as it is typed."""
    if type(value) is bool and name != "init_lora_weights":
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    values = [shlex.quote(str(item)) for item in (value if isinstance(value, tuple) else (value,))]
    if name in ("reward", "reward_weight"):
        return [f"{flag(name)} {item}" for item in values]
    return [f"{flag(name)} {' '.join(values)}"]
