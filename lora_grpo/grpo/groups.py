"""Groups without a signal: their advantages become 0, and the update skips their rows. Dynamic
sampling (DAPO, arXiv 2503.14476) replaces them with groups of other prompts.

A draw is what TRL samples for some prompts at once; several are joined into the batch that TRL
would have made of the same rows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from trl.trainer.utils import nanstd, pad

from lora_grpo.grpo.batch import Batch, join_batches

SAME = 1e-6  # rewards closer than this are equal
ADDED = 1e-4  # TRL's addition to a standard deviation that it divides by
Inputs = dict[str, Any]


def dead_groups(compared: Sequence[float | None], num_generations: int) -> list[bool]:
    """Return for each group whether its rewards are all equal, so that there is nothing to learn;
    `compared` is what `Batch.compared` returns.

    Completions to which no reward applied (None) are left out.
    """
    starts = range(0, len(compared), num_generations)
    groups = [compared[start : start + num_generations] for start in starts]
    known = [[value for value in group if value is not None] for group in groups]
    return [not group or max(group) - min(group) < SAME for group in known]


def normalise_in_groups(
    scores: torch.Tensor, weights: torch.Tensor, num_generations: int
) -> list[float | None]:
    """Return each completion's weighted sum of its rewards (B, R), each normalised in its group, as
    TRL's `normalize_then_sum` adds them up (GDPO, arXiv 2601.05242); None if no reward applied.

    A reward that is equal for all of a group counts as exactly 0, not as its rounding error.
    """
    grouped = scores.double().view(-1, num_generations, scores.shape[1])
    lowest = grouped.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    normal = centred / (nanstd(grouped, dim=1, keepdim=True) + ADDED)
    normal = normal.masked_fill(highest - lowest < SAME, 0.0).view_as(scores)
    sums = (normal * weights.double()).nansum(1)
    applied = ~scores.isnan().all(1)
    return [value if there else None for value, there in zip(sums.tolist(), applied, strict=True)]


def normalise_in_batch(compared: Sequence[float | None]) -> torch.Tensor:
    """Return the advantages (B,) that TRL's `normalize_then_sum` makes of a batch's sums."""
    sums = torch.tensor([torch.nan if value is None else value for value in compared])
    return ((sums - sums.nanmean()) / (nanstd(sums) + ADDED)).nan_to_num(nan=0.0)


def silence_dead_groups(
    advantages: torch.Tensor, compared: Sequence[float | None], num_generations: int
) -> torch.Tensor:
    """Return the advantages (B,) with those of dead groups exactly zero.

    TRL divides the rounding error of a mean of equal rewards by 1e-4, up to 1e-4 of an advantage.
    """
    dead = torch.tensor(dead_groups(compared, num_generations), device=advantages.device)
    return advantages.masked_fill(dead.repeat_interleave(num_generations), 0.0)


def live_rows(inputs: Inputs, learns_from_all: bool = False) -> list[int]:
    """Return the rows of a micro-batch with a gradient of the loss with respect to their
    log-probs: those with an advantage, or `learns_from_all` that have a token."""
    live = inputs["completion_mask"].any(dim=1)
    if not learns_from_all:
        live &= inputs["advantages"] != 0
    return live.nonzero()[:, 0].tolist()


def arrange(micro_batches: list[Inputs], learns_from_all: bool) -> list[Inputs]:
    """Distribute a step's rows anew over its micro-batches: completions of one prompt together, in
    the order of their length, and rows without a gradient last, so that whole micro-batches of them
    cost nothing.

    Micro-batches keep their sizes. The weight of a row in TRL's losses does not depend on its
    micro-batch, so the gradient is the same; bnpo, the exception, is allowed only one.
    """
    rows = {name: gather(name, micro_batches) for name in micro_batches[0]}
    live = set(live_rows(rows, learns_from_all))
    prompts = masked_lists(rows["prompt_ids"], rows["prompt_mask"])
    lengths = rows["completion_mask"].sum(1).tolist()
    order = sorted(range(len(prompts)), key=lambda r: (r not in live, prompts[r], lengths[r]))
    chosen = torch.tensor(order, device=rows["completion_ids"].device)
    sizes = [len(batch["completion_ids"]) for batch in micro_batches]
    parts = {
        name: value[chosen].split(sizes) if is_by_row(value) else [value] * len(sizes)
        for name, value in rows.items()
    }
    return [{name: parts[name][index] for name in parts} for index in range(len(sizes))]


def is_by_row(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def gather(name: str, micro_batches: list[Inputs]) -> Any:
    first = micro_batches[0][name]
    return torch.cat([batch[name] for batch in micro_batches]) if is_by_row(first) else first


def masked_lists(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    pairs = zip(ids, mask.bool(), strict=True)
    return [row[kept].tolist() for row, kept in pairs]


def padding_share(micro_batches: list[Inputs]) -> float:
    """Return the share of padding in a step's micro-batches (B, P + T) as TRL pads them."""
    masks = [batch[name] for batch in micro_batches for name in ("prompt_mask", "completion_mask")]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


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
    """The rows of the dataset that may replace others, and the rounds allowed per step."""

    rows: Sequence[Row]
    rounds: int
    seed: int

    def choose(self, count: int, taken: set[str], step: int, drawn: int) -> list[Row]:
        """Return up to `count` rows whose questions are not taken; the choice depends only on the
        seed, the step and the number of draws before."""
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
    """Return the step's batch, as large as `first`: groups with a signal in the order they were
    drawn, then as many groups without one as are needed.

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
    """Return for each group whether any of its completions has a gradient."""
    compared, advantages = draw.batch.compared(), draw.output["advantages"]
    advantages = silence_dead_groups(advantages, compared, num_generations)
    live = set(live_rows({**draw.output, "advantages": advantages}))
    starts = range(0, len(compared), num_generations)
    return [not live.isdisjoint(range(start, start + num_generations)) for start in starts]


def join(draws: Sequence[Draw], kept: list[int], pad_token_id: int) -> Draw:
    """Return the rows `kept` of the concatenated draws, with no more padding than they need.

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
    joined = {}
    for name in names - {"num_items_in_batch"}:
        rows = list(chain.from_iterable(output[name] for output in outputs))
        rows = [rows[index] for index in kept]
        if name in PROMPT_FIELDS | COMPLETION_FIELDS:
            side = "left" if name in PROMPT_FIELDS else "right"
            joined[name] = pad(rows, fill.get(name, 0), side)
        else:
            joined[name] = torch.stack(rows)
    longest_prompt, longest = joined["prompt_mask"].sum(1).max(), max(batch.tokens)
    joined |= {name: joined[name][:, -longest_prompt:] for name in names & PROMPT_FIELDS}
    joined |= {name: joined[name][:, :longest] for name in names & COMPLETION_FIELDS}
    joined["num_items_in_batch"] = joined["completion_mask"].sum()
    if batch.normalised is not None:  # over the batch, so over this one
        joined["advantages"] = normalise_in_batch(batch.normalised).to(joined["advantages"])
    return Draw(joined, batch)
