"""A card's sections on the run: its settings, and the command that makes it again."""

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from string import Formatter
from typing import Any

from lora_grpo.config.files import given_knobs
from lora_grpo.config.knobs import TrainConfig, flag
from lora_grpo.config.presets import PRESETS, preset_knobs
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.grpo.batch import had_signal
from lora_grpo.results.markdown import code, escape, fence, table
from lora_grpo.results.metadata import Kind
from lora_grpo.results.records import Records, short_name

SHARES = {
    "lenient accuracy": "lenient_accuracy",
    "format": "format_rate",
    "truncated": "truncated_rate",
}
READING = f"""\
Strict: the number inside `{NUMBER_TASK.answer[0]}` is the gold answer. \
Lenient: the last number anywhere is. Format: exactly the tags asked for, in order, the reasoning \
not empty, nothing after. Truncated: cut off by the token limit."""
NOT_ITS_OWN = """\
These are the figures of the adapter on its base, from which this model was made; how near this \
model comes to it is under Proof."""


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def describe_items(records: Records) -> str:
    found = records.evaluation
    problems = f"{found['num_items']:,} problems of {code(short_name(found['dataset']))}"
    return f"{problems} ({escape(found['split'])})"


def write_evaluation(records: Records, kind: Kind) -> str | None:
    """Return the figures of base and adapter with the protocol, or None where none are recorded."""
    found = records.evaluation
    if not found:
        return None
    trained = records.trained
    prompt = ", the training prompt" if "system_prompt" in trained else ""
    # Only the run itself, which records its best step, is known to have held the base so.
    in_4bit = trained.get("load_in_4bit") and "best_step" in found
    protocol = (
        f"{describe_items(records)}, the same for base and adapter: greedy decoding, one sample a "
        f"problem{prompt}{', the base held in 4-bit NF4' if in_4bit else ''}. {READING}"
    )
    parts = [protocol, figures_table(found), test_of_difference(records), gain_by_format(found)]
    parts += [chosen_step(records), NOT_ITS_OWN if kind != "adapter" else None]
    return "\n\n".join(part for part in parts if part)


def figures_table(found: dict[str, Any]) -> str:
    models = (found["base"], found["adapter"])
    spans = [f"{percent(low)} to {percent(high)}" for low, high in (m["ci95"] for m in models)]
    rows = [
        ["strict accuracy", *(percent(model["strict_accuracy"]) for model in models)],
        ["95 % interval of it (Wilson)", *spans],
        *([label, *(percent(model[key]) for model in models)] for label, key in SHARES.items()),
        ["mean length in tokens", *(f"{model['mean_completion_tokens']:.1f}" for model in models)],
    ]
    return table(("", "base", "adapter"), rows)


def test_of_difference(records: Records) -> str | None:
    p = records.evaluation.get("mcnemar_p")
    if p is None:
        return None
    pairs = [(item["base"]["strict"], item["adapter"]["strict"]) for item in records.items]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    counts = f" The adapter solves {gained} that the base does not, and fails {lost} that it does."
    value = f"= {p:.2g}" if p > 0 else "< 1e-300"
    verdict = "" if p < 0.05 else " That is no evidence of a difference."
    return (
        f"McNemar's exact test of strict accuracy on the same problems: p {value}.{verdict}"
        f"{counts if pairs else ''}"
    )


def gain_by_format(found: dict[str, Any]) -> str | None:
    """Say how much of the gain the lenient count does not show, where that is a good part."""
    strict, lenient = (
        100 * (found["adapter"][key] - found["base"][key])
        for key in ("strict_accuracy", "lenient_accuracy")
    )
    if strict <= 0 or lenient > strict / 2:
        return None
    return (
        f"Strict accuracy changed by {strict:+.1f} points and lenient by {lenient:+.1f}: most of "
        "the gain is that answers stand where they were asked for."
    )


def chosen_step(records: Records) -> str | None:
    """Return which step was kept and why, or that there was nothing to learn."""
    best, steps = records.evaluation.get("best_step"), records.trained.get("steps")
    if best is None or steps is None:
        return None
    if records.metrics and not any(map(had_signal, records.metrics)):
        return (
            "No step of the training had a signal, because all completions of each group earned "
            "the same: nothing was learnt."
        )
    row = next((row for row in records.validation if row["step"] == best), None)
    if row is None:
        return f"The adapter is that of step {best} of {steps}, the last."
    return f"The adapter is that of step {best} of {steps}, {why_best(records, row)}."


def why_best(records: Records, row: dict[str, Any]) -> str:
    """Return by what a step was chosen; older runs recorded neither number nor interval."""
    items = row.get("num_items", records.trained.get("num_validation_items"))
    why = f"the best on {items} validation problems"
    if "ci95" not in row:
        return why
    low, high = map(percent, row["ci95"])
    count = len(records.validation)
    chosen = f", the highest of {count}, so rather flattered" if count > 1 else ""
    return (
        f"{why}: strict accuracy {percent(row['strict_accuracy'])} (95 % interval {low} to "
        f"{high}{chosen})"
    )


def write_prompt(records: Records) -> str | None:
    """Return the system prompt and the worked example trained with."""
    if "system_prompt" not in records.trained:
        return None
    parts = ["The system prompt that it was trained with:", fence(records.trained["system_prompt"])]
    if records.trained.get("example"):
        asked, answered = records.messages()[1:3]
        parts += ["Before each question stood one worked example:", fence(asked["content"])]
        parts.append(fence(answered["content"]))
    return "\n\n".join(parts)


def write_samples(records: Records) -> str | None:
    """Return the first right and the first wrong answer of the adapter, word for word."""
    chosen = [
        (right, next((item for item in records.items if item["adapter"]["strict"] is right), None))
        for right in (True, False)
    ]
    parts = [
        f"The first problem of the evaluation that the adapter answers "
        f"{'rightly' if right else 'wrongly'} (number {item['index'] + 1}; gold answer "
        f"{code(item['answer'])}):\n\n{fence(item['question'])}\n\n"
        f"{fence(item['adapter']['completion'])}"
        for right, item in chosen
        if item
    ]
    return "\n\n".join(parts) or None


def write_limits(records: Records) -> str:
    """Return what is not known of the model, as far as the records show."""
    found, trained = records.evaluation, records.trained
    lines = ["What the base model gets wrong elsewhere, the training did not set out to mend."]
    if found:
        lines.append(
            f"Evaluated on {describe_items(records)} by greedy decoding alone; no other task, "
            "language, prompt or way of sampling is on record, and nothing on safety."
        )
    else:
        lines.append("No evaluation of it is on record.")
    if "dataset" in trained:
        lines.append(f"Trained on {code(short_name(trained['dataset']))} alone.")
    else:
        lines.append("How it was trained is not on record.")
    if found and found["adapter"]["truncated_rate"] > 0:
        cut = percent(found["adapter"]["truncated_rate"])
        lines.append(f"{cut} of its answers were cut off at the token limit.")
    return "\n".join(f"- {line}" for line in lines)


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
