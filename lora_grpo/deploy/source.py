"""What answers in a chat or behind a server: an adapter on its base, or a merged model.

A folder and its records go in; out comes what to load and how it was asked in training. Reads no
weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.data.prompt import PromptStyle
from lora_grpo.machine.files import read_jsonl
from lora_grpo.machine.folders import check_kind
from lora_grpo.policy.adapter import ADAPTERS, CONFIG, RunRecord, read_record
from lora_grpo.policy.base import check_architecture, fit_padding, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ITEMS = "eval_items.jsonl"


@dataclass(frozen=True)
class ChatSource:
    """`weights` is the base's folder, or the merged model itself, which has no `adapter_dir`."""

    name: str
    folder: Path
    records: Path
    base: str | None
    weights: Path
    adapter_dir: Path | None
    tokenizer_folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    style: PromptStyle
    max_completion_length: int
    load_in_4bit: bool
    double_quant: bool

    def describe(self) -> str:
        """Return what answers, in a few words."""
        held = ", in 4-bit NF4" if self.load_in_4bit else ""
        if self.adapter_dir is None:
            return f"{self.folder}, a whole model{held}"
        return f"{self.folder}, an adapter on {self.base}{held}"

    def sample_question(self) -> str:
        """Return the first question that the run was evaluated on, or a plain one."""
        rows = read_jsonl(self.records / ITEMS)
        return rows[0]["question"] if rows else "What is 2 + 3?"


def find_source(
    folder: Path,
    model: str | None = None,
    load_in_4bit: bool | None = None,
    script: str = "chat.py",
) -> ChatSource:
    """Return what a folder holds; `model` replaces the base that an adapter remembers.

    Raises:
        FileNotFoundError, ValueError: it holds neither an adapter nor a whole model, it is a
        checkpoint, or its base cannot be had.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: give an adapter directory such as adapters/<run>, or a "
            "merged model such as merged/<run>"
        )
    runnable = ("export",) if (folder / "config.json").is_file() else ()
    wanted = "an adapter directory or a merged model"
    check_kind(folder, script, wanted, (*ADAPTERS, "merged", "model", *runnable))
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return merged_source(folder, model, load_in_4bit)
    return adapter_source(folder, model, load_in_4bit)


def adapter_source(folder: Path, model: str | None, load_in_4bit: bool | None) -> ChatSource:
    from lora_grpo.merge.deltas import check_adapter_dir

    record = read_record(check_adapter_dir(folder))
    weights = record.find_base(model)
    return build_source(record, weights, model or record.base, load_in_4bit)


def merged_source(folder: Path, model: str | None, load_in_4bit: bool | None) -> ChatSource:
    if model is not None:
        raise ValueError(
            f"--model names the base of an adapter, and {folder} is a whole model: leave it out"
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no *.safetensors: give a merged model such as merged/<run>, which "
            "merge_adapter.py writes"
        )
    check_architecture(folder)
    return build_source(read_record(folder), folder, None, load_in_4bit)


def build_source(
    record: RunRecord, weights: Path, base: str | None, load_in_4bit: bool | None
) -> ChatSource:
    tokenizer = load_tokenizer(tokenizer_folder := record.tokenizer_folder(weights))
    fit_padding(tokenizer, weights)
    in_4bit = record.load_in_4bit and record.is_adapter
    return ChatSource(
        name=record.folder.resolve().name,
        folder=record.folder,
        records=record.records,
        base=base,
        weights=weights,
        adapter_dir=record.folder if record.is_adapter else None,
        tokenizer_folder=tokenizer_folder,
        tokenizer=tokenizer,
        style=record.fitted_style(tokenizer),
        max_completion_length=record.max_completion_length,
        load_in_4bit=in_4bit if load_in_4bit is None else load_in_4bit,
        double_quant=record.double_quant,
    )
