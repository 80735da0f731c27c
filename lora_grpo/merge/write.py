"""A plan becomes safetensors files, tensor by tensor: read, add the delta in float32, cast, append.

Only weights that are adapted or were quantised are held whole; everything else passes through in
blocks, so that memory stays near the largest linear layer, whatever the size of the model.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.machine.files import read_json
from lora_grpo.merge.inputs import INDEX_FILE, FourBit, MergePlan
from lora_grpo.merge.tensors import (
    DTYPES,
    Slot,
    StoredTensor,
    read_blocks,
    read_tensor,
    write_safetensors,
)
from lora_grpo.policy.base import (
    choose_placement,
    merge_end_ids,
    quantization,
    read_config,
    read_tokenizer,
)

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
    """Return the base's generation config with every EOS id and no flag that it would ignore.

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


def write_weights(plan: MergePlan, folder: Path, advance: Callable[[int], None]) -> None:
    """Write the merged tensors under the base's file names; `advance` hears of bytes as written.

    Raises:
        ValueError: a merged value is not finite or does not fit the 16-bit type.
    """
    quantized = find_quantized(plan)

    def produce(slot: Slot) -> Iterator[torch.Tensor]:
        for block in merge_blocks(plan, slot, slot.name in quantized):
            yield block
            advance(block.numel() * block.element_size())

    for file_name, slots in plan.layout.items():
        write_safetensors(folder / file_name, slots, produce)
    if (plan.base_folder / INDEX_FILE).is_file():
        index = read_json(plan.base_folder / INDEX_FILE)
        index.setdefault("metadata", {})["total_size"] = plan.nbytes
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def merge_blocks(plan: MergePlan, slot: Slot, is_quantized: bool) -> Iterator[torch.Tensor]:
    """Yield one merged tensor, flat and in blocks."""
    stored, dtype = plan.tensors[slot.name], DTYPES[slot.dtype]
    if slot.name in plan.deltas or is_quantized:
        weight = load_weight(stored, plan.four_bit if is_quantized else None)
        if slot.name in plan.deltas:
            weight += plan.deltas[slot.name].compute()
        yield cast(weight, dtype, slot.name)
    elif slot.is_float:
        yield from (cast(block, dtype, slot.name) for block in read_blocks(stored))
    else:
        yield from read_blocks(stored)


def load_weight(stored: StoredTensor, four_bit: FourBit | None) -> torch.Tensor:
    """Return a base weight in float32, as the 4-bit policy saw it if `four_bit` says how."""
    weight = read_tensor(stored)
    return weight.float() if four_bit is None else dequantize(weight, four_bit)


def dequantize(weight: torch.Tensor, four_bit: FourBit) -> torch.Tensor:
    """Return a weight after NF4 and back, in float32, as transformers with bitsandbytes loads it.

    It is cast to the compute type before it is quantised, and on the GPU if there is one, as the
    policy's was.
    """
    import bitsandbytes

    quantized = bitsandbytes.nn.Params4bit(
        weight.to(getattr(torch, four_bit.dtype)),
        requires_grad=False,
        compress_statistics=four_bit.double_quant,
        quant_type="nf4",
    ).to(choose_placement().device)
    values = bitsandbytes.functional.dequantize_4bit(quantized.data, quantized.quant_state)
    return values.float().cpu()


def find_quantized(plan: MergePlan) -> frozenset[str]:
    """Return the tensors that are to pass through NF4: none, or what transformers quantises."""
    if plan.base == "original":
        return frozenset()
    import bitsandbytes
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            read_config(plan.base_folder), trust_remote_code=False
        )
    settings = quantization(True, plan.four_bit.double_quant, plan.four_bit.dtype)
    AutoHfQuantizer.from_config(settings).preprocess_model(model=model, device_map=None)
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    )


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return the values in a 16-bit type.

    Raises:
        ValueError: a value is not finite, or too large for the type; the message names the tensor.
    """
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{name} is not finite after the merge: the base or the adapter is damaged, fetch it "
            "again"
        )
    result = values.to(dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"{name} reaches {values.abs().max():.3g}, more than --dtype {str(dtype)[6:]} holds "
            f"({torch.finfo(dtype).max:.3g}): use --dtype bfloat16"
        )
    return result
