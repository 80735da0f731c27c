"""Which completions an update learns from, and in which order it takes them.

A group whose completions all earned the same is dead, its advantages are zero: without a KL term
none of its log-probs has a gradient, so none is computed. TRL's loss still counts its tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

SAME = 1e-6  # rewards closer than this are equal
Inputs = dict[str, Any]


def dead_groups(totals: Sequence[float | None], num_generations: int) -> list[bool]:
    """Return for each group whether its completions all earned the same, and so teach nothing.

    Those that earned None, because no reward applied to them, are left out.
    """
    starts = range(0, len(totals), num_generations)
    groups = [totals[start : start + num_generations] for start in starts]
    known = [[total for total in group if total is not None] for group in groups]
    return [not group or max(group) - min(group) < SAME for group in known]


def silence_dead_groups(
    advantages: torch.Tensor, totals: Sequence[float | None], num_generations: int
) -> torch.Tensor:
    """Return the advantages (B,) with those of dead groups exactly zero.

    TRL divides the rounding error of a mean of equal rewards by 1e-4, up to 1e-4 of an advantage.
    """
    dead = torch.tensor(dead_groups(totals, num_generations), device=advantages.device)
    return advantages.masked_fill(dead.repeat_interleave(num_generations), 0.0)


def live_rows(inputs: Inputs, beta: float) -> list[int]:
    """Return the rows of a micro-batch whose log-probs the loss has a gradient by."""
    live = inputs["completion_mask"].any(dim=1)
    if beta == 0:
        live &= inputs["advantages"] != 0
    return live.nonzero()[:, 0].tolist()


def arrange(micro_batches: list[Inputs], beta: float) -> list[Inputs]:
    """Deal a step's rows out anew: a prompt's completions together and by their length, the rows
    without a gradient last, so that whole micro-batches of them cost nothing.

    Every micro-batch keeps its number of rows. TRL's losses weigh each row alike in whichever it
    is, so the gradient is the same; bnpo, the exception, is held to a single one.
    """
    rows = {name: gather(name, micro_batches) for name in micro_batches[0]}
    live = set(live_rows(rows, beta))
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
