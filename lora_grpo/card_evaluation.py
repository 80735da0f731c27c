"""A card's sections on what was measured: figures with their protocol, real answers, limits."""

from typing import Any

from lora_grpo.batch import had_signal
from lora_grpo.card_base import short_name
from lora_grpo.card_markdown import code, escape, fence, table
from lora_grpo.card_metadata import Kind
from lora_grpo.card_records import Records

SHARES = {
    "lenient accuracy": "lenient_accuracy",
    "format": "format_rate",
    "truncated": "truncated_rate",
}
READING = """\
Strict: the number inside `<answer>` is the gold answer. Lenient: the last number anywhere is. \
Format: exactly the tags asked for, in order, the reasoning not empty, nothing after. Truncated: \
cut off by the token limit."""
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
