"""A plan becomes a model folder, its weights tensor by tensor: read, add the delta in float32,
cast, append. Memory stays near the largest tensor, whatever the size of the model.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.machine.files import read_json, write_json
from lora_grpo.merge.inputs import INDEX_FILE, MergePlan
from lora_grpo.merge.tensors import BLOCK_ELEMENTS, DTYPES, Slot, read_tensor, write_safetensors
from lora_grpo.policy.adapter import EVAL, EVAL_ITEMS, METRICS, TRAIN_CONFIG
from lora_grpo.policy.base import choose_placement, merge_end_ids, read_config, read_tokenizer

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

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
    copied = [plan.tokenizer_folder / name for name in TOKENIZER_FILES]
    # What the run recorded goes with the weights, so that prompt, chat and card are known from
    # them; the figures of `last` and of a checkpoint are not the run's.
    copied.append(plan.record.records / TRAIN_CONFIG)
    copied += [plan.record.folder / name for name in (EVAL, EVAL_ITEMS, METRICS)]
    copied += plan.base_folder.glob("LICENSE*")
    for path in filter(Path.is_file, copied):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", build_config(plan))
    tokenizer = read_tokenizer(plan.tokenizer_folder)
    write_json(folder / "generation_config.json", build_generation_config(plan, tokenizer))


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

    config = read_json(plan.base_folder / "config.json")
    path = plan.base_folder / "generation_config.json"
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


def write_weights(plan: MergePlan, folder: Path) -> None:
    """Write the merged tensors under the base's file names, with a progress bar on a terminal.

    Raises:
        ValueError: a merged value is not finite or does not fit the 16-bit type.
    """
    from rich.console import Console
    from rich.progress import Progress

    quantized, console = find_quantized(plan), Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=plan.nbytes)

        def produce(slot: Slot) -> Iterator[torch.Tensor]:
            yield from merge_tensor(plan, slot, slot.name in quantized)
            progress.advance(task, slot.nbytes)

        for file_name, slots in plan.layout.items():
            write_safetensors(folder / file_name, slots, produce)
    if (plan.base_folder / INDEX_FILE).is_file():
        index = read_json(plan.base_folder / INDEX_FILE)
        index.setdefault("metadata", {})["total_size"] = plan.nbytes
        write_json(folder / INDEX_FILE, index)


def merge_tensor(plan: MergePlan, slot: Slot, is_quantized: bool) -> Iterator[torch.Tensor]:
    """Yield one merged tensor, flat and in blocks."""
    weight, dtype = load_weight(plan, slot.name, is_quantized), DTYPES[slot.dtype]
    if slot.name in plan.deltas:
        weight = weight.float() + plan.deltas[slot.name].compute()
    for block in weight.flatten().split(BLOCK_ELEMENTS):
        yield cast(block, dtype, slot.name) if slot.is_float else block


def load_weight(plan: MergePlan, name: str, is_quantized: bool) -> torch.Tensor:
    """Return a weight that is merged into: the base's own, or what the 4-bit policy saw of it."""
    weight = read_tensor(plan.tensors[name])
    return dequantize(weight, plan.four_bit) if is_quantized else weight


def dequantize(weight: torch.Tensor, four_bit: "BitsAndBytesConfig") -> torch.Tensor:
    """Return a weight after NF4 and back, in float32, as transformers with bitsandbytes loads it.

    It is cast to the compute type before it is quantised, and on the GPU if there is one, as the
    policy's was.
    """
    import bitsandbytes

    quantized = bitsandbytes.nn.Params4bit(
        weight.to(four_bit.bnb_4bit_compute_dtype),
        requires_grad=False,
        compress_statistics=four_bit.bnb_4bit_use_double_quant,
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
    AutoHfQuantizer.from_config(plan.four_bit).preprocess_model(model=model, device_map=None)
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
