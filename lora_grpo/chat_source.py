"""What answers in a chat or behind a server: an adapter on its base, or a merged model.

A folder and its records go in; out comes what to load and how it was asked in training. Reads no
weights.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapter import CONFIG, read_train_config
from lora_grpo.config import TrainConfig
from lora_grpo.evaluate import base_of, trained_style
from lora_grpo.model import resolve_model
from lora_grpo.prompt import PromptStyle

ITEMS = "eval_items.jsonl"


@dataclass(frozen=True)
class ChatSource:
    """`weights` is the base's folder, or the merged model itself, which has no `adapter_dir`."""

    name: str
    folder: Path
    base: str | None
    weights: Path
    adapter_dir: Path | None
    tokenizer_folder: Path
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
        items = self.folder / ITEMS
        if not items.is_file():
            return "What is 2 + 3?"
        with items.open(encoding="utf-8") as file:
            return json.loads(file.readline())["question"]


def find_source(
    folder: Path, model: str | None = None, load_in_4bit: bool | None = None
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
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return merged_source(folder, model, load_in_4bit)
    return adapter_source(folder, model, load_in_4bit)


def adapter_source(folder: Path, model: str | None, load_in_4bit: bool | None) -> ChatSource:
    from lora_grpo.lora_delta import check_adapter_dir
    from lora_grpo.merge_inputs import has_tokenizer

    known = known_settings(check_adapter_dir(folder))
    base = model or known["model"] or base_of(folder)
    weights = resolve_model(base, None if model else known["revision"])
    return ChatSource(
        name=folder.resolve().name,
        folder=folder,
        base=base,
        weights=weights,
        adapter_dir=folder,
        tokenizer_folder=folder if has_tokenizer(folder) else weights,
        style=trained_style(known),
        max_completion_length=known["max_completion_length"],
        load_in_4bit=known["load_in_4bit"] if load_in_4bit is None else load_in_4bit,
        double_quant=known["bnb_4bit_use_double_quant"],
    )


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
    known = known_settings(folder)
    return ChatSource(
        name=folder.resolve().name,
        folder=folder,
        base=None,
        weights=folder,
        adapter_dir=None,
        tokenizer_folder=folder,
        style=trained_style(known),
        max_completion_length=known["max_completion_length"],
        load_in_4bit=bool(load_in_4bit),
        double_quant=known["bnb_4bit_use_double_quant"],
    )


def known_settings(folder: Path) -> dict[str, Any]:
    """Return the run's settings where its record is there, else the defaults on a whole base."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return defaults | {"model": None, "load_in_4bit": False} | read_train_config(folder)
