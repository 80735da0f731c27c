"""Sample completions from the model itself, with one copy of each prompt's cache per group.

A prompt goes through the model once, and all G completions of its group attend to the same cached
keys and values; a completion's own go into a buffer that is allocated once. Transformers'
`generate` keeps a copy of the prompt's cache per completion and copies it at every token.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.policy.drawing import draw
from lora_grpo.policy.generate import cut_at_end
from lora_grpo.policy.layers import attention_replaced

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

ATTENTION = "shared_decoding"


class Decoding:
    """The keys and values that the next token attends to, of prompts and of completions.

    There are U prompts, padded to P tokens, and B = U x G completions; those of one prompt are
    adjacent rows.
    """

    def __init__(self, cache: Any, prompt_mask: torch.Tensor, rows: int, length: int) -> None:
        """Use a cache of U prompts, and allocate `length` more tokens for each of `rows` rows."""
        self.prompts = [(layer.keys, layer.values) for layer in cache.layers]  # (U, heads, P, size)
        self.own = [
            tuple(part.new_empty(rows, part.shape[1], length, part.shape[3]) for part in pair)
            for pair in self.prompts
        ]
        self.padding = ~prompt_mask.bool()[:, None, None, None]  # (U, 1, 1, 1, P)
        self.count = 0  # tokens of each completion before the next one

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the next token's key and value (B, heads, 1, size); return its output, shaped like
        the query."""
        (prompt_keys, prompt_values), (keys, values) = self.prompts[layer], self.own[layer]
        keys[:, :, self.count], values[:, :, self.count] = key[:, :, 0], value[:, :, 0]
        prompts, heads, length, size = prompt_keys.shape
        group = len(query) // prompts
        each = query.reshape(prompts, group, heads, -1, size)  # R queries for each key's head
        keys, values = (
            part[:, :, : self.count + 1].unflatten(0, (prompts, group)) for part in (keys, values)
        )
        shared = torch.einsum("ughrd,uhpd->ughrp", each, prompt_keys)
        shared = shared.masked_fill(self.padding, -torch.inf)
        scores = torch.cat([shared, each @ keys.mT], -1)  # (U, G, heads, R, P + tokens)
        weights = (scores.float() * scale).softmax(-1).to(value.dtype)
        first, rest = weights.split([length, self.count + 1], -1)
        output = torch.einsum("ughrp,uhpd->ughrd", first, prompt_values) + rest @ values
        return output.reshape(query.shape)


def decoding_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    decoding: Decoding | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from one token of each completion; the signature is transformers' interface's.

    Raises:
        RuntimeError: the model does not pass keyword arguments on to its attention.
    """
    if decoding is None:
        raise RuntimeError("the model does not pass `decoding` on to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = decoding.attend(module.layer_idx, query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


def once_each(prompts: list[list[int]]) -> list[list[int]]:
    """Return each prompt once if all are repeated equally often in adjacent rows, else all rows."""
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    sizes = {b - a for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)}
    return [prompts[start] for start in starts] if len(sizes) == 1 else prompts


def choose(logits: torch.Tensor, settings: "GenerationConfig") -> torch.Tensor:
    """Draw one token per row of logits (B, V), with temperature and top-p as transformers does."""
    from transformers import TopPLogitsWarper

    scores = logits.float() / settings.temperature
    if settings.top_p is not None and settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(None, scores)
    return draw(scores.softmax(-1))


def sample(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    settings: "GenerationConfig",
    end_ids: list[int],
    max_completion_length: int,
) -> list[list[int]]:
    """Return a completion of each prompt, up to and including the token that ends it.

    `model` is in evaluation mode. Adjacent equal prompts are computed once.
    """
    rows = decode(model, prompts, lambda x: choose(x, settings), end_ids, max_completion_length)
    return [cut_at_end(row, end_ids)[0] for row in rows.tolist()]


@torch.no_grad()
def decode(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    pick: Callable[[torch.Tensor], torch.Tensor],
    end_ids: list[int],
    length: int,
) -> torch.Tensor:
    """Return the tokens (B, up to `length`) that `pick` takes from each step's logits (B, V); stop
    early when every row holds one of `end_ids`."""
    single = once_each(prompts)
    width, group = max(map(len, single)), len(prompts) // len(single)
    padded = [[0] * (width - len(prompt)) + prompt for prompt in single]
    ids = torch.tensor(padded, device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in single], device=model.device)
    mask = torch.arange(width, device=model.device) >= width - lengths[:, None]  # (U, P)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    start = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = start.logits[:, -1].repeat_interleave(group, 0)  # (B, V)
    position = lengths.repeat_interleave(group)[:, None]
    decoding = Decoding(start.past_key_values, mask, len(prompts), length)
    ends, drawn = torch.tensor(end_ids, device=model.device), []
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    with attention_replaced(model, ATTENTION, decoding_attention):
        while True:
            tokens = pick(logits)
            drawn.append(tokens)
            finished |= torch.isin(tokens, ends)
            if len(drawn) == length or finished.all():
                return torch.stack(drawn, 1)
            logits = model(
                input_ids=tokens[:, None],
                position_ids=position,
                use_cache=False,
                decoding=decoding,
            ).logits[:, -1]
            decoding.count += 1
            position = position + 1
