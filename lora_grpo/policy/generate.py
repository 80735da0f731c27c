"""Decoding in batches, greedy or sampled, for evaluation; training samples through TRL.

Prompts are sorted by length, so that a batch holds little padding; results are in the order of the
prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_grpo.policy.base import merge_end_ids
from lora_grpo.policy.drawing import Sampling, SeededDraws

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lora_grpo.machine.out_of_memory import RowLimit

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Completion:
    """What a model wrote: `tokens` counts the end-of-turn token; `truncated` means that it never
    came."""

    text: str
    tokens: int
    truncated: bool


def greedy_settings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_completion_length: int
) -> "GenerationConfig":
    """Return settings of greedy decoding, without a repetition penalty of the model's own."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=max_completion_length,
        eos_token_id=merge_end_ids(tokenizer, model.generation_config.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
    )


def cut_at_end(ids: list[int], end_ids: list[int]) -> tuple[list[int], bool]:
    """Return the tokens up to and including the first that ends a turn, and whether there was
    none."""
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1], False
    return ids, True


def complete_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    settings: "GenerationConfig",
    draws: SeededDraws | None = None,
) -> list[Completion]:
    """Continue a batch of rendered prompts, greedily or with the tokens that `draws` draws."""
    import torch

    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    with torch.no_grad():
        output = model.generate(
            **inputs, generation_config=settings, logits_processor=[draws] if draws else None
        )  # (B, P+T)
    completions = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        ids, truncated = cut_at_end(row, settings.eos_token_id)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        completions.append(Completion(text, len(ids), truncated))
    return completions


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    max_completion_length: int,
    batch_size: int,
    advance: Advance = lambda count: None,
    limit: "RowLimit | None" = None,
    sampling: Sampling | None = None,
) -> list[Completion]:
    """Complete each rendered prompt greedily, or sample several completions of each; results are in
    the order of the prompts, the samples of one adjacent.

    `advance` is called with the size of each finished batch. `limit` remembers from one call to the
    next how many completions fit into memory at once.
    """
    from lora_grpo.machine.out_of_memory import RowLimit
    from lora_grpo.policy.layers import one_matrix

    limit = limit or RowLimit("evaluation", print)
    was_training = model.training
    model.eval()
    settings = greedy_settings(model, tokenizer, max_completion_length)
    if sampling:
        prompts = [prompt for prompt in prompts for _ in range(sampling.num_samples)]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Completion] = {}

    def answer_part(rows: list[int]) -> list[Completion]:
        draws = SeededDraws(sampling, rows, max_completion_length) if sampling else None
        texts = [prompts[row] for row in rows]
        return complete_batch(model, tokenizer, texts, settings, draws)

    with one_matrix(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]

            def answer(rows: int, chosen: list[int] = chosen) -> list[Completion]:
                parts = [chosen[first : first + rows] for first in range(0, len(chosen), rows)]
                return [done for part in parts for done in answer_part(part)]

            found.update(zip(chosen, limit.run(answer, len(chosen)), strict=True))
            advance(len(chosen))
    model.train(was_training)
    return [found[index] for index in range(len(prompts))]
