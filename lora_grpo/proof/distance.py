"""How far two models are apart: on the same token sequences, logits against logits.

A model and prompts become probe sequences, sequences become logits, two streams of logits become a
distance. Only the continuation is batched; each sequence's logits are computed alone, so that there
is no padding to leave out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_POSITIONS = 48


@dataclass(frozen=True)
class Distance:
    """Three measures of the other model from the reference, over all compared positions.

    `largest_flipped_margin` is the largest lead that a greedy choice of the reference had over its
    second where the other model chooses differently; 0 where it never does.
    """

    max_logit_difference: float
    mean_kl: float
    greedy_agreement: float
    largest_flipped_margin: float
    positions: int


def continue_greedily(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return each prompt's ids and the model's greedy completion, end-of-turn token included."""
    from transformers import GenerationConfig

    rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    # Padding is masked, and a tokenizer's own pad token may lie beyond the embeddings.
    input_ids = torch.zeros((len(rows), width), dtype=torch.long, device=model.device)  # (B, P)
    mask = torch.zeros_like(input_ids)  # (B, P)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.tensor(row, device=model.device)
        mask[index, width - len(row) :] = 1
    settings = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids, attention_mask=mask, generation_config=settings
        )
    for row, completion in zip(rows, output[:, width:].tolist(), strict=True):
        eos = tokenizer.eos_token_id
        row += completion[: completion.index(eos) + 1] if eos in completion else completion
    return rows


def collect_logits(
    model: "PreTrainedModel", sequences: list[list[int]], kept: int = KEPT_POSITIONS
) -> Iterator[torch.Tensor]:
    """Yield the float32 logits of each sequence's last positions, (K, V), on the CPU."""
    for sequence in sequences:
        ids = torch.tensor([sequence], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # (1, T, V)
        yield logits[0, -kept:].float().cpu()


def measure_distance(reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> Distance:
    """Compare two streams of logits, (K, V) per sequence; KL(reference || other) in nats per token.

    A logit that is not a number makes the measures so too, and no bound admits that.
    """
    differences, divergences, margins = [], [], []  # each holds (K,) a sequence
    for left, right in zip(reference, other, strict=True):
        differences.append((left - right).abs().amax(-1))
        log_p, log_q = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        lead = left.topk(2).values.diff().neg().squeeze(-1)
        margins.append(torch.where(left.argmax(-1) == right.argmax(-1), -1.0, lead))
    margin = torch.cat(margins)
    return Distance(
        max_logit_difference=torch.cat(differences).max().item(),
        mean_kl=torch.cat(divergences).mean().item(),
        greedy_agreement=(margin < 0).double().mean().item(),
        largest_flipped_margin=margin.max().clamp(min=0).item(),
        positions=len(margin),
    )
