"""A batch of prompts and completions as one row of tokens, each different prompt once.

Every layer but attention works on a token at a time, so a packed row needs no padding and no second
copy of a prompt. Attention goes group by group: a prompt sees itself, a completion its prompt and
itself; gradients flow back through both (as in Prefix Grouper, arXiv 2506.05433). Only packed
queries, keys and values are kept for the backward pass, which computes the attention again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "shared_prefix"


@dataclass(frozen=True)
class Group:
    """The tokens of one prompt and then of its C completions, of up to S tokens each.

    `slots` (C, S) says where in the group each completion's tokens stand, `valid` (C, S) which of
    them exist, `mask` (S, prompt + S) what a completion's token sees.
    """

    start: int
    prompt: int
    size: int
    slots: torch.Tensor
    valid: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """One row of N tokens, and the M predictions that are wanted of it.

    Prediction m is made at the token `predictors[m]`, of `targets[m]`, and belongs to `rows[m]`,
    `columns[m]` of the completions (B, T).
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
    """Return where the tokens of a group stand, from its completions' lengths."""
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
    groups: list[Group] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' interface of attention, for a packed row; the model passes `groups` on."""
    if groups is None:
        raise RuntimeError("packed attention was asked for a batch that is not packed")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast rotary embeddings may leave queries and keys wider than values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = PackedAttention.apply(query, key, value, groups, scale)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def attention_in_groups(model: "PreTrainedModel") -> Iterator[None]:
    """Let the model attend as packed rows need it; hold it through the backward pass too, which
    runs the layers again under gradient checkpointing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    config = model.config.get_text_config()
    own = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own


def why_not_packed(model: "PreTrainedModel") -> str | None:
    """Return what in a model does not go with packed rows, or None where nothing speaks against it.

    What is asked: attention that transformers lets one replace, rotary positions, every layer
    with plain and full attention.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not let its attention be replaced"
    if not hasattr(model.base_model, "rotary_emb"):
        return f"{type(model).__name__} has no rotary positions"
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        return f"its layers attend by {', '.join(sorted(kinds - {'full_attention'})) or 'windows'}"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention's logits are capped"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}"
    return None
