"""Dynamic sampling (DAPO, arXiv 2503.14476): groups without a signal give way to groups of other
prompts, drawn until the batch is full of groups with one or the rounds are used up.

A draw is what TRL makes of some prompts at once; several are joined into the batch that TRL would
have made of the same rows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from lora_grpo.batch import Batch, join_batches
from lora_grpo.live_rows import Inputs, live_rows, silence_dead_groups

Row = dict[str, Any]

PROMPT_FIELDS = {"prompt_ids", "prompt_mask"}  # (B, P), padded on the left
COMPLETION_FIELDS = {  # (B, T), padded on the right
    *("completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps"),
    *("sampling_per_token_logps", "importance_sampling_ratio"),
}
JOINED = {*PROMPT_FIELDS, *COMPLETION_FIELDS, "advantages", "num_items_in_batch"}


@dataclass(frozen=True)
class Draw:
    """Groups that were sampled together: TRL's tensors of them, and the same rows for the logs."""

    output: Inputs
    batch: Batch


@dataclass(frozen=True)
class Replacements:
    """The problems that may stand in for others, as rows of the training data set, and how often
    in a step."""

    rows: Sequence[Row]
    rounds: int
    seed: int

    def choose(self, count: int, taken: set[str], step: int, drawn: int) -> list[Row]:
        """Return up to `count` rows whose questions are not taken; the same again for the same
        step and number of draws before."""
        free = [row for row in self.rows if row["question"] not in taken]
        return random.Random(f"{self.seed} {step} {drawn}").sample(free, min(count, len(free)))


def fill_with_signal(
    first: Draw,
    sample: Callable[[list[Row]], Draw],
    replacements: Replacements,
    step: int,
    num_generations: int,
    pad_token_id: int,
) -> Draw:
    """Return the step's batch, as large as `first`: the groups with a signal in the order drawn,
    then as many without one as are needed to fill it.

    `sample` is given each prompt `num_generations` times.
    """
    draws, live = [first], live_groups(first, num_generations)
    wanted = len(live)
    for drawn in range(1, replacements.rounds + 1):
        taken = {question for draw in draws for question in draw.batch.questions}
        rows = replacements.choose(wanted - sum(live), taken, step, drawn)
        if not rows:
            break
        draws.append(sample([row for row in rows for _ in range(num_generations)]))
        live += live_groups(draws[-1], num_generations)
    if len(draws) == 1:
        return first
    groups = sorted(range(len(live)), key=lambda group: not live[group])[:wanted]
    kept = [group * num_generations + row for group in groups for row in range(num_generations)]
    return join(draws, kept, pad_token_id)


def live_groups(draw: Draw, num_generations: int) -> list[bool]:
    """Tell for each group whether any of its completions has an advantage and counts."""
    totals, advantages = draw.batch.totals(), draw.output["advantages"]
    advantages = silence_dead_groups(advantages, totals, num_generations)
    live = set(live_rows({**draw.output, "advantages": advantages}, beta=0.0))
    starts = range(0, len(totals), num_generations)
    return [not live.isdisjoint(range(start, start + num_generations)) for start in starts]


def join(draws: Sequence[Draw], kept: list[int], pad_token_id: int) -> Draw:
    """Return the rows `kept` of draws laid one after another, padded no further than they need.

    Raises:
        ValueError: TRL returned a tensor that is not known here.
    """
    outputs = [draw.output for draw in draws]
    names = set().union(*outputs)
    if names - JOINED:
        raise ValueError(
            f"--dynamic-sampling cannot join TRL's {', '.join(sorted(names - JOINED))}: leave the "
            "flag out"
        )
    batch = join_batches([draw.batch for draw in draws], kept)
    # A ratio of 1 corrects nothing: vespo sums its logarithm over the padding too.
    fill = dict.fromkeys(("prompt_ids", "completion_ids"), pad_token_id)
    fill["importance_sampling_ratio"] = 1
    joined = {
        name: stack([output[name] for output in outputs], name, fill.get(name, 0))[kept]
        for name in names - {"num_items_in_batch"}
    }
    longest_prompt, longest = joined["prompt_mask"].sum(1).max(), max(batch.tokens)
    joined |= {name: joined[name][:, -longest_prompt:] for name in names & PROMPT_FIELDS}
    joined |= {name: joined[name][:, :longest] for name in names & COMPLETION_FIELDS}
    joined["num_items_in_batch"] = joined["completion_mask"].sum()
    return Draw(joined, batch)


def stack(parts: Sequence[torch.Tensor], name: str, fill: float) -> torch.Tensor:
    """Return tensors (B, W) as one, each padded to the widest on its field's side."""
    if name not in PROMPT_FIELDS | COMPLETION_FIELDS:
        return torch.cat(parts)
    widest = max(part.shape[1] for part in parts)
    room = [widest - part.shape[1] for part in parts]
    sides = [(width, 0) if name in PROMPT_FIELDS else (0, width) for width in room]
    return torch.cat([pad(part, side, value=fill) for part, side in zip(parts, sides, strict=True)])
