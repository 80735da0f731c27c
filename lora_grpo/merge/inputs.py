"""What a merge starts from: adapter and base become a plan, or a sentence that says why not.

Whatever can be known without merging is checked here: that the adapter can be merged and changed
something, that it fits the base and was trained on it. Of the base only the headers are read, and
the bytes for its hash.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lora_grpo.data.prompt import PromptStyle
from lora_grpo.machine.files import read_json
from lora_grpo.merge.deltas import (
    Delta,
    check_adapter_dir,
    check_learned,
    is_embedding,
    read_deltas,
    refuse_unmergeable,
)
from lora_grpo.merge.tensors import DTYPES, Slot, StoredTensor, read_header
from lora_grpo.policy.adapter import CONFIG, TRAIN_CONFIG, RunRecord, hash_weights, read_record
from lora_grpo.policy.base import choose_placement, quantization, read_config, read_tokenizer

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = 64 << 20
Dtype = Literal["bfloat16", "float16"]
Base = Literal["original", "dequantized"]


@dataclass(frozen=True)
class MergePlan:
    """All that the merge and its proof need; `four_bit` says how the policy's base was quantised
    while it was trained, None for a run on the base as it is."""

    record: RunRecord
    base: Base
    base_name: str
    base_folder: Path
    base_sha256: str
    tokenizer_folder: Path
    tensors: dict[str, StoredTensor]
    deltas: dict[str, Delta]
    dtype: Dtype
    four_bit: "BitsAndBytesConfig | None"
    style: PromptStyle
    warning: str | None

    @property
    def layout(self) -> dict[str, list[Slot]]:
        """The merged model's tensors by file, in the base's order; floats take the plan's type."""
        stored = next(name for name, dtype in DTYPES.items() if dtype == getattr(torch, self.dtype))
        files: dict[str, list[Slot]] = {}
        for name, tensor in self.tensors.items():
            slot = Slot(name, stored if tensor.is_float else tensor.dtype, tensor.shape)
            files.setdefault(tensor.path.name, []).append(slot)
        return files

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slots in self.layout.values() for slot in slots)


def plan_merge(
    adapter_dir: Path, model: str | None = None, base: Base = "original", dtype: Dtype | None = None
) -> MergePlan:
    """Check an adapter and its base and return what to merge; `model` replaces the remembered base.

    Raises:
        FileNotFoundError: the adapter, the base or a file of theirs is missing.
        ValueError: the adapter cannot be merged, changed nothing, or does not belong to the base.
    """
    check_adapter_dir(adapter_dir)
    record, adapter = read_record(adapter_dir), read_json(adapter_dir / CONFIG)
    refuse_unmergeable(adapter)
    four_bit = read_four_bit(record)
    if base == "dequantized" and four_bit is None:
        raise ValueError(
            f"--base dequantized is for adapters that were trained on a 4-bit base, {adapter_dir} "
            "was not: leave --base out"
        )
    base_folder, base_name = record.find_base(model), model or record.base
    tensors = read_base(base_folder)
    deltas = read_deltas(adapter_dir, adapter, tensors)
    check_learned(adapter_dir, deltas)
    check_fit(deltas, tensors, base_folder)
    sha256 = hash_weights(base_folder)
    warning = compare_hash(record.base_sha256, sha256, base_folder, named=bool(model))
    tokenizer_folder = record.tokenizer_folder(base_folder)
    return MergePlan(
        record=record,
        base=base,
        base_name=base_name,
        base_folder=base_folder,
        base_sha256=sha256,
        tokenizer_folder=tokenizer_folder,
        tensors=tensors,
        deltas=deltas,
        dtype=dtype or choose_dtype(tensors),
        four_bit=four_bit,
        style=read_style(record, tokenizer_folder),
        warning=warning,
    )


def read_four_bit(record: RunRecord) -> "BitsAndBytesConfig | None":
    """Return how a run's base was quantised, None where it was not."""
    if record.load_in_4bit and record.quant_type != "nf4":
        raise ValueError(
            f"{record.records / TRAIN_CONFIG} says bnb_4bit_quant_type {record.quant_type!r}: only "
            "nf4 is known"
        )
    dtype = record.dtype or choose_placement().dtype
    return quantization(record.load_in_4bit, record.double_quant, dtype)


def read_style(record: RunRecord, tokenizer_folder: Path) -> PromptStyle:
    """Return how the run asked; a tokenizer without a chat template renders no turns at all."""
    tokenizer = read_tokenizer(tokenizer_folder)
    return record.fitted_style(tokenizer) if tokenizer.chat_template else record.style


def read_base(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a 16-bit or 32-bit model, file by file in the order of their data."""
    if "quantization_config" in read_json(folder / "config.json"):
        raise ValueError(
            f"the base {folder} is quantised already (quantization_config in its config.json): "
            "name the 16-bit original with --model"
        )
    index = folder / INDEX_FILE
    shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {SINGLE_FILE}
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(
            f"the base {folder} has no {missing[0]}, and only safetensors are read: fetch it, or "
            "load the model and save it again with save_pretrained"
        )
    headers = (read_header(folder / shard) for shard in sorted(shards))
    return {name: tensor for header in headers for name, tensor in header.items()}


def check_fit(deltas: dict[str, Delta], tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Raise a ValueError for an adapter of another base, or one that would untie embeddings."""
    # The loaded config has the default where config.json does not say.
    tied = read_config(folder).get_text_config().tie_word_embeddings
    for name, delta in deltas.items():
        if tied and is_embedding(delta.module):
            raise ValueError(
                f"the adapter changes {delta.module}, but the base {folder} ties its embeddings: "
                "the two cannot change apart; use the adapter as it is, with chat.py and "
                "evaluate.py, or train on the linear layers of the blocks alone"
            )
        if name not in tensors:
            raise ValueError(
                f"the adapter changes {name}, which the base {folder} does not have: name the base "
                "it was trained on with --model"
            )
        if tensors[name].shape != delta.shape:
            raise ValueError(
                f"the adapter changes {name} as {list(delta.shape)}, in the base {folder} it is "
                f"{list(tensors[name].shape)}: name the base it was trained on with --model"
            )


def compare_hash(recorded: str | None, found: str, folder: Path, named: bool) -> str | None:
    """Raise for another base than the run's own; return a warning if the user named that one."""
    if recorded in (None, found):
        return None
    difference = (
        f"the base {folder} is not the one the adapter was trained on (sha256 {found[:12]}, "
        f"train_config.json says {recorded[:12]})"
    )
    if named:
        return difference
    raise ValueError(f"{difference}: fetch that one, or name a base with --model to merge into it")


def choose_dtype(tensors: dict[str, StoredTensor]) -> Dtype:
    """Return float16 if most of the base's bytes are of that type, else bfloat16."""
    held = {dtype: sum(t.nbytes for t in tensors.values() if t.dtype == dtype) for dtype in DTYPES}
    return "float16" if held["F16"] == max(held.values()) else "bfloat16"
