"""What a card may say: everything that a run left on record, read once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapter import CONFIG, has_tokenizer, read_record, read_train_config
from lora_grpo.atomic import read_jsonl
from lora_grpo.card_base import (
    Base,
    Licence,
    find_base,
    is_hub_id,
    read_languages,
    read_licence,
    read_object,
)
from lora_grpo.model import load_tokenizer
from lora_grpo.prompt import Message, PromptStyle, build_messages

PLAIN_QUESTION = "What is 12 + 30?"


@dataclass(frozen=True)
class Records:
    """A run's records, what is missing empty; `evaluation` and `items` compare base and adapter."""

    folder: Path
    base: Base | None
    licence: Licence
    languages: list[str]
    trained: dict[str, Any]
    style: PromptStyle
    adapter: dict[str, Any]
    evaluation: dict[str, Any]
    items: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @property
    def hub_datasets(self) -> list[str]:
        """The Hub ids of the data trained on, without their configurations."""
        name = self.trained.get("dataset", "")
        return [name.partition(":")[0]] if is_hub_id(name) else []

    def messages(self, question: str | None = None) -> list[Message]:
        """Return the chat that asks a question, the first evaluated one by default, as the run
        asked it; without a system prompt where none is recorded."""
        if question is None:
            question = self.items[0]["question"] if self.items else PLAIN_QUESTION
        if "system_prompt" not in self.trained:
            return [{"role": "user", "content": question}]
        return build_messages(question, self.style)


def read_records(records: Path, folder: Path) -> Records:
    """Return what `records` holds on the weights in `folder`, which may be the same folder."""
    base, evaluation = find_base(records, folder), read_object(records / "eval.json")
    compared = {"base", "adapter"} <= evaluation.keys()
    items = read_jsonl(records / "eval_items.jsonl") if compared else []
    return Records(
        folder=records,
        base=base,
        licence=read_licence(base, folder),
        languages=read_languages(base),
        trained=read_train_config(records),
        style=fitted_style(records, folder),
        adapter=read_object(records / CONFIG),
        evaluation=evaluation if compared else {},
        items=[item for item in items if {"base", "adapter"} <= item.keys()],
        metrics=read_jsonl(records / "metrics.jsonl"),
        validation=read_jsonl(records / "validation.jsonl"),
    )


def fitted_style(records: Path, folder: Path) -> PromptStyle:
    """Return how the run asked, as the chat template beside the weights renders it, if any."""
    record = read_record(records)
    place = next(filter(has_tokenizer, (folder, records)), None)
    return record.fitted_style(load_tokenizer(place)) if place else record.style
