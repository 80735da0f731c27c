"""The files around the merged weights: config, generation config, tokenizer, licence, records.

A plan goes in; a folder that any loader reads as a plain 16-bit model comes out.
"""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.adapter import read_json
from lora_grpo.merge_inputs import MergePlan
from lora_grpo.model import merge_end_ids, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# What the run recorded goes with the weights, so that prompt, chat and card are known from them.
RECORDS = ("train_config.json", "eval.json", "eval_items.jsonl", "metrics.jsonl")
SAMPLING_ONLY = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def write_side_files(plan: MergePlan, folder: Path) -> None:
    """Write everything but the weights."""
    for name in TOKENIZER_FILES:
        if (plan.tokenizer_folder / name).is_file():
            shutil.copyfile(plan.tokenizer_folder / name, folder / name)
    for name in RECORDS:
        if (plan.adapter_dir / name).is_file():
            shutil.copyfile(plan.adapter_dir / name, folder / name)
    for licence in plan.base_folder.glob("LICENSE*"):
        shutil.copyfile(licence, folder / licence.name)
    write_json(folder / "config.json", build_config(plan))
    tokenizer = read_tokenizer(plan.tokenizer_folder)
    write_json(folder / "generation_config.json", build_generation_config(plan, tokenizer))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_config(plan: MergePlan) -> dict[str, Any]:
    """Return the base's config with the merged type."""
    config = read_json(plan.base_folder / "config.json")
    config.pop("torch_dtype", None)
    return {**config, "dtype": plan.dtype}


def build_generation_config(
    plan: MergePlan, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Return the base's generation config with every EOS id, less the flags that it would ignore.

    Raises:
        ValueError: transformers would not save it again.
    """
    from transformers import GenerationConfig

    config, path = (
        read_json(plan.base_folder / "config.json"),
        plan.base_folder / "generation_config.json",
    )
    generation = read_json(path) if path.is_file() else {}
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if generation.get(name) is None and config.get(name) is not None:
            generation[name] = config[name]
    generation["eos_token_id"] = merge_end_ids(tokenizer, generation.get("eos_token_id"))
    if tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    rows = config.get("vocab_size", math.inf)
    if beyond := [token for token in tokenizer.all_special_ids if token >= rows]:
        raise ValueError(
            f"the tokenizer of {plan.tokenizer_folder} has special tokens {beyond}, but the base's "
            f"embedding has {rows} rows: copy the base's tokenizer files over it, or resize the "
            "base as it was for training and name that with --model"
        )
    if not generation.get("do_sample"):
        generation = {
            name: value for name, value in generation.items() if name not in SAMPLING_ONLY
        }
    try:
        GenerationConfig(**generation).validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{path} cannot be carried over ({error}): mend it in the base") from error
    return generation
