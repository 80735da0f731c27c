"""Pack a batch of prompts and completions into one row of tokens that holds each prompt once.

Every layer except attention treats each token on its own, so a packed row needs no padding and no
second copy of a prompt. Attention is computed group by group: a prompt attends to itself, a
completion to its prompt and itself, and gradients flow back through both (as in Prefix Grouper,
arXiv 2506.05433). Only packed queries, keys and values are saved for the backward pass, which
computes the attention again.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lora_grpo.policy.layers import attention_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "shared_prefix"


@dataclass(frozen=True)
class Group:
    """The tokens of one prompt, followed by those of its C completions of up to S tokens.

    `slots` (C, S) are the positions of the completions' tokens in the group, `valid` (C, S) marks
    those that exist, and `mask` (S, prompt + S) what a completion's token attends to.
    """

    start: int
    prompt: int
    size: int
    slots: torch.Tensor
    valid: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """One row of N tokens, and the M predictions to compute.

    Prediction m is made at the token `predictors[m]` for the token `targets[m]`, and belongs to
    `rows[m]`, `columns[m]` of the completions (B, T).
    """

    input_ids: torch.Tensor  # (1, N)
    position_ids: torch.Tensor  # (1, N)
    groups: list[Group]
    predictors: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def pack(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int, rows: list[int]
) -> Packed:
    """Pack these rows of left-padded prompts and right-padded completions (B, P+T).

    Positions are those of the padded rows, so that rotary embeddings are rounded alike. The last
    token of a completion predicts nothing and is left out.
    """
    ids, mask = input_ids.tolist(), attention_mask.tolist()
    first = input_ids.shape[1] - completion_length
    same_prompt: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        prompt = tuple(ids[row][c] for c in range(first) if mask[row][c])
        same_prompt.setdefault(prompt, []).append(row)
    tokens: list[int] = []
    positions: list[int] = []
    wanted: list[tuple[int, int, int, int]] = []
    groups = []
    for prompt, members in same_prompt.items():
        start, length = len(tokens), len(prompt)
        tokens += prompt
        positions += range(first - length, first)
        lengths = []
        for row in members:
            count, at = sum(mask[row][first:]), len(tokens)
            before = [start + length - 1, *range(at, at + count - 1)]
            wanted += [(before[c], ids[row][first + c], row, c) for c in range(count)]
            tokens += ids[row][first : first + count - 1]
            positions += range(first, first + count - 1)
            lengths.append(count - 1)
        groups.append(build_group(start, length, lengths, input_ids.device))
    make = input_ids.new_tensor
    return Packed(make([tokens]), make([positions]), groups, *make(wanted).view(-1, 4).unbind(1))


def build_group(start: int, prompt: int, lengths: list[int], device: torch.device) -> Group:
    """Return the positions of a group's tokens, from its completions' lengths."""
    longest = max(lengths)
    counts = torch.tensor(lengths)
    begins = prompt + counts.cumsum(0) - counts
    steps = torch.arange(longest)
    valid = steps < counts[:, None]
    slots = torch.where(valid, begins[:, None] + steps, prompt)
    seen = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)
    parts = (slots.to(device), valid.to(device), seen.to(device))
    return Group(start, prompt, prompt + sum(lengths), *parts)


def attend(
    group: Group, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the attention's output for a group's tokens; all are (heads, tokens, head size)."""
    repeats, end = len(query) // len(key), group.prompt
    key, value = (part.repeat_interleave(repeats, 0) for part in (key, value))
    own = (part[None, :, :end] for part in (query, key, value))
    prompt = scaled_dot_product_attention(*own, is_causal=True, scale=scale)[0]
    if not group.slots.numel():
        return prompt

    def each(part: torch.Tensor) -> torch.Tensor:
        return part[:, group.slots].transpose(0, 1)  # (C, heads, S, head size)

    def after_prompt(part: torch.Tensor) -> torch.Tensor:
        shared = part[None, :, :end].expand(len(group.slots), -1, -1, -1)
        return torch.cat([shared, each(part)], dim=2)

    completions = scaled_dot_product_attention(
        each(query), after_prompt(key), after_prompt(value), attn_mask=group.mask, scale=scale
    )
    return torch.cat([prompt, completions.transpose(0, 1)[:, group.valid]], dim=1)


class PackedAttention(torch.autograd.Function):
    """Attention of a packed row: queries, keys, values (1, heads, N, head size), groups, scale."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: list[Group],
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scale = groups, scale
        return torch.cat(
            [attend(group, *cut(group, query, key, value), scale) for group in groups], dim=1
        )[None]

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        saved = ctx.saved_tensors  # gradient checkpointing gives them out once
        found = []
        for group in ctx.groups:
            parts = [part.detach().requires_grad_() for part in cut(group, *saved)]
            with torch.enable_grad():
                output = attend(group, *parts, ctx.scale)
            (own,) = cut(group, gradient)
            found.append(torch.autograd.grad(output, parts, own))
        whole = (torch.cat(parts, dim=1)[None] for parts in zip(*found, strict=True))
        return (*whole, None, None)


def cut(group: Group, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return a group's part of tensors (1, heads, N, head size), without the first dimension."""
    return [tensor[0, :, group.start : group.start + group.size] for tensor in tensors]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    groups: list[Group] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in a packed row; the signature is that of transformers' attention interface.

    Raises:
        RuntimeError: the model does not pass keyword arguments on to its attention, or asks it for
        something that is not computed here.
    """
    if groups is None:
        raise RuntimeError("the model does not pass `groups` on to its attention")
    asked = {"dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
    if any(asked.values()):
        values = ", ".join(f"{name} {value}" for name, value in asked.items() if value)
        raise RuntimeError(f"its attention has {values}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast rotary embeddings may leave queries and keys wider than values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = PackedAttention.apply(query, key, value, groups, scale)
    return output.transpose(1, 2).contiguous(), None


def attention_in_groups(model: "PreTrainedModel") -> AbstractContextManager[None]:
    """Let the model use `packed_attention` in the block. Keep it active during the backward pass
    too: gradient checkpointing runs the layers again."""
    return attention_replaced(model, ATTENTION, packed_attention)
