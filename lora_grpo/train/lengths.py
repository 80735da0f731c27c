"""How long completions are, and how many --max-completion-length cuts off: said before a run."""

import dataclasses
import math
import time
from collections.abc import Sequence

from lora_grpo.grpo.settings import order_problems
from lora_grpo.policy.base import read_config
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.open import Policy
from lora_grpo.results.evaluate import evaluate_model
from lora_grpo.results.scoring import Item
from lora_grpo.train.console import Display, percent
from lora_grpo.train.plan import Plan

SAMPLED = 16
LONGER = 4  # times the limit: how far a preview lets completions go
SHARE = 0.9  # of the completions that a suggested limit holds
STEP = 32  # suggested limits are multiples of it


def with_longer_limit(plan: Plan) -> Plan:
    """Return the plan with the longest completions that a preview samples."""
    config, text = plan.config, read_config(plan.folder).get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    longest = min(LONGER * config.max_completion_length, positions - config.max_prompt_length)
    longest = max(int(longest), config.max_completion_length)
    config = dataclasses.replace(config, max_completion_length=longest)
    return dataclasses.replace(plan, config=config)


def limit_that_holds(items: Sequence[Item], share: float = SHARE) -> int | None:
    """Return the fewest tokens that hold a share of the completions, or None if more than the rest
    did not end at all."""
    lengths = sorted(math.inf if item.truncated else item.tokens for item in items)
    longest = lengths[math.ceil(share * len(lengths)) - 1]
    return None if longest == math.inf else int(longest)


def describe_lengths(items: Sequence[Item], limit: int, sampled_to: int) -> str:
    """Return the share of completions, sampled to `sampled_to` tokens, that `limit` cuts off, and
    the limit to give instead."""
    cut = sum(item.truncated or item.tokens > limit for item in items) / len(items)
    holds = limit_that_holds(items)
    said = f"--max-completion-length {limit} cuts off {percent(cut)} of {len(items)} completions"
    if holds is None:
        return (
            f"{said}; more than {1 - SHARE:.0%} do not even end within {sampled_to:,} tokens: the "
            "model repeats itself, or needs a longer limit yet"
        )
    if holds <= limit:
        return f"{said}; {SHARE:.0%} have at most {holds} tokens, which it holds"
    suggested = STEP * math.ceil(holds / STEP)
    return f"{said}; {SHARE:.0%} have at most {holds} tokens: --max-completion-length {suggested}"


def describe_truncation(items: Sequence[Item], limit: int) -> str | None:
    """Return a warning if the limit cut off more than a tenth of the answers."""
    cut = sum(item.truncated for item in items) / len(items)
    if 1 - cut >= SHARE:
        return None
    return (
        f"{percent(cut)} of {len(items)} answers before GRPO were cut off at "
        f"--max-completion-length {limit}, and earn no reward for an answer: in a new run "
        f"--length-preview samples {SAMPLED} completions of up to {LONGER * limit:,} tokens and "
        f"says which limit holds {SHARE:.0%} of them"
    )


def preview_length(limit: int, plan: Plan, policy: Policy, display: Display) -> None:
    """Sample a completion of a few training problems with a plan of `with_longer_limit`, and say
    how long they are and what `limit` would cut off."""
    config, train, started = plan.config, plan.data.train, time.perf_counter()
    problems = order_problems(train, min(SAMPLED, len(train)), config.seed)
    longest, sampling = config.max_completion_length, Sampling(1, config.temperature, config.seed)
    with display.bar("sampling completions", len(problems)) as advance:
        items = evaluate_model(
            policy, plan.tokenizer, problems, plan.data.style, longest, advance, sampling
        )
    seconds = time.perf_counter() - started
    display.say_always(describe_lengths(items, limit, longest))
    display.say_always(
        f"{len(items)} completions of up to {longest:,} tokens took {seconds:.0f} s; nothing was "
        "written"
    )
