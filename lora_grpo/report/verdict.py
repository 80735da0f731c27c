"""What a run came to, in two sentences: whether it learnt and how sure that is, and what to do."""

from typing import Any

from lora_grpo.results.card import percent
from lora_grpo.results.scoring import STARTS, find_start

SURE = 0.05  # McNemar's p below which two models differ


def judge_run(run: dict[str, Any], findings: list[str]) -> list[str]:
    """Return the two sentences; the first of the findings says what to do where there are any."""
    outcome, following = compare(run)
    return [outcome, findings[0] if findings else following]


def compare(run: dict[str, Any]) -> tuple[str, str]:
    found, place = run["evaluation"], f"adapters/{run['name']}"
    if not {"base", "adapter"} <= found.keys():
        again = f"lora-grpo train --resume {place}"
        return describe_progress(run), f"Next: let it end; if it was stopped, {again} continues it."
    start = find_start(found)
    before, adapter = found[start], found["adapter"]
    p = found["mcnemar_p" if start == "base" else f"mcnemar_p_{start}"]
    change = (
        f"strict accuracy went from {accuracy(before)} to {accuracy(adapter)} on the same "
        f"{found['num_items']:,} problems (McNemar's p = {p:.2g})"
    )
    if start != "base":
        change += f", by GRPO alone: the first figure is {STARTS[start]}, the base's is "
        change += accuracy(found["base"])
    if p >= SURE:
        steps = 2 * (run["steps"] or run["step"])
        return (
            f"Not shown to have learnt: {change}, no more than chance can do.",
            f"Next: train longer (lora-grpo train --resume {place} --max-steps {steps}) or compare "
            "on more problems (--num-eval-items).",
        )
    if adapter["strict_accuracy"] < before["strict_accuracy"]:
        return (
            f"It got worse: {change}.",
            "Next: read the lost answers below, and train again with a lower --learning-rate.",
        )
    return (
        f"It learnt: {change}.",
        f"Next: read the gained and lost answers below, then lora-grpo merge {place}.",
    )


def accuracy(model: dict[str, Any]) -> str:
    low, high = model["ci95"]
    return f"{percent(model['strict_accuracy'])} ({100 * low:.1f} to {percent(high)})"


def describe_progress(run: dict[str, Any]) -> str:
    """Return how far a run is that has not been evaluated."""
    rewards = [reward for reward in run["metrics"].get("reward", []) if reward is not None]
    if not rewards:
        return "Not evaluated yet: no step is recorded."
    few = min(5, len(rewards))
    first, last = (sum(part) / few for part in (rewards[:few], rewards[-few:]))
    text = (
        f"Not evaluated yet, at step {run['step']} of {run['steps']}: the mean reward is "
        f"{last:.3f} in the last {few} steps, {first:.3f} in the first"
    )
    validated = run["validation"].get("strict_accuracy")
    return f"{text}; the best validation is {percent(max(validated))}." if validated else f"{text}."
