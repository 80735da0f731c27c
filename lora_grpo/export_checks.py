"""Checks that every exported transformers folder passes: config, tokenizer, ends, ties."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.logit_distance import measure_distance
from lora_grpo.merge_checks import (
    PROBE_TEXT,
    Check,
    check_eos,
    check_generation_config,
    check_ties,
    check_tokenizer,
    shares_embeddings,
)
from lora_grpo.model import declared_end_ids, read_config, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_KEYS = {"dtype", "quantization_config", "transformers_version", "_name_or_path"}


def check_folder(merged: Path, folder: Path, model: "PreTrainedModel") -> list[Check]:
    """Compare what stands around the weights of a loaded folder with the merged one's."""
    tokenizer = read_tokenizer(merged)
    tied = bool(read_config(merged).tie_word_embeddings)
    found = model.generation_config.eos_token_id
    ends = [found] if isinstance(found, int) else found
    return [
        check_same_config(merged, folder),
        check_tokenizer(folder, tokenizer, [PROBE_TEXT]),
        check_generation_config(folder),
        check_eos(ends, declared_end_ids(merged, tokenizer)),
        check_ties(shares_embeddings(model), tied),
    ]


def check_same_config(merged: Path, folder: Path) -> Check:
    """Compare what both configs come to once loaded, but for type and quantisation."""
    found, expected = (read_config(path).to_dict() for path in (folder, merged))
    keys = sorted(
        key
        for key in (found.keys() | expected.keys()) - OWN_KEYS
        if found.get(key) != expected.get(key)
    )
    detail = f"differs in {', '.join(keys)}" if keys else "the merged model's"
    return Check("config", not keys, detail)


def describe_distance(reference: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, Any]:
    """Return how far logits are from the merged model's, as the report holds it."""
    return asdict(measure_distance(reference, found))
