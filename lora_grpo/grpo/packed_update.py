"""The policy's log-probs and entropies, computed with each prompt once and without padding.

TRL's loss gets the tensors (B, T) that its own method would give it. `trainer` is always a
`LoraGRPOTrainer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from lora_grpo.grpo.groups import live_rows
from lora_grpo.grpo.logprobs import TiledLogProbs
from lora_grpo.grpo.packing import attention_in_groups, pack
from lora_grpo.policy.layers import fused

if TYPE_CHECKING:
    from trl import GRPOTrainer


@contextmanager
def computing_packed(model: torch.nn.Module) -> Iterator[None]:
    """Let the model compute packed rows; keep it active during the backward pass too."""
    with attention_in_groups(model), fused(model):
        yield


def packed_scores(
    trainer: "GRPOTrainer",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies (B, T) of completions, `rows` of them at a time."""
    in_update = trainer.step.inputs is not None  # which is inside `computing_packed` already
    with nullcontext() if in_update else computing_packed(trainer.inner_model()):
        parts = [
            packed_logps(trainer, *part, completion_length)
            for part in zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
        ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def packed_logps(
    trainer: "GRPOTrainer",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies (B, T) of completions under the current adapter.

    An update skips rows without a gradient: they get the old log-probs, so a ratio of 1, and the
    mean entropy of the computed rows, so that TRL logs that mean (NaN if no row is computed). With
    an entropy bonus no row is skipped, and its entropies have a gradient.
    """
    inputs = trainer.step.inputs
    rows = range(len(input_ids)) if inputs is None else live_rows(inputs, trainer.learns_from_all)
    bonus = inputs is not None and trainer.entropy_coef != 0
    old = None if inputs is None else inputs.get("old_per_token_logps")
    blank = torch.zeros(len(input_ids), completion_length, device=input_ids.device)
    logps = blank if old is None else old.float()
    rows = [row for row in rows if attention_mask[row, -completion_length:].any()]
    if not rows:
        # A loss without a graph could not be passed to `backward`; this one's gradient is 0.
        return logps + sum(
            (p * 0).sum() for p in trainer.trained
        ), blank if bonus else blank + torch.nan
    packed, model = pack(input_ids, attention_mask, completion_length, rows), trainer.inner_model()
    with trainer.accelerator.autocast():
        hidden = model.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            groups=packed.groups,
        ).last_hidden_state[0, packed.predictors]
        weight = model.get_output_embeddings().weight
        found = TiledLogProbs.apply(hidden, weight, packed.targets, trainer.temperature, bonus)
    trainer.step.tokens_computed += packed.input_ids.numel()
    place, entropies = (packed.rows, packed.columns), torch.zeros_like(blank)
    if inputs is not None and not bonus:
        entropies += found[1].mean()
    return logps.index_put(place, found[0]), entropies.index_put(place, found[1])
