"""What a card may say: everything that a run left on record, read once."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.data.prompt import Message, PromptStyle, build_messages
from lora_grpo.data.tables import is_data_file
from lora_grpo.machine.files import read_json, read_jsonl
from lora_grpo.machine.folders import MERGED_FILE
from lora_grpo.policy.adapter import (
    CONFIG,
    EVAL,
    EVAL_ITEMS,
    METRICS,
    VALIDATION,
    RunRecord,
    has_tokenizer,
    read_record,
)
from lora_grpo.policy.base import EMBEDDED, EMBEDDED_FOLDER, load_tokenizer, public_name
from lora_grpo.tasks.reasoning_gym import PREFIX

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
LICENCE_KEYS = ("license", "license_name", "license_link")
# A sentence that a licence's text holds, white space and case apart.
LICENCE_TEXTS = {
    "apache-2.0": "apache license version 2.0, january 2004",
    "mit": "permission is hereby granted, free of charge, to any person obtaining a copy",
}
PLAIN_QUESTION = "What is 12 + 30?"


@dataclass(frozen=True)
class Base:
    """A base model: `name` is fit to be published, `folder` is None where it is not on this
    machine."""

    name: str
    hub_id: str | None
    revision: str | None
    folder: Path | None

    @property
    def embedded(self) -> bool:
        return self.name == EMBEDDED


@dataclass(frozen=True)
class Licence:
    """A base's licence as metadata, empty where it is not known, and what says so, if anything."""

    metadata: dict[str, str]
    source: str


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

    def messages(self) -> list[Message]:
        """Return the chat that asks the first evaluated question as the run asked it; without a
        system prompt where none is recorded."""
        question = self.items[0]["question"] if self.items else PLAIN_QUESTION
        if "system_prompt" not in self.trained:
            return [{"role": "user", "content": question}]
        return build_messages(question, self.style)


def read_records(records: Path, folder: Path) -> Records:
    """Return what `records` holds on the weights in `folder`, which may be the same folder."""
    record, evaluation = read_record(records), read_if_there(records / EVAL)
    compared = {"base", "adapter"} <= evaluation.keys()
    base = find_base(record, folder)
    metadata = read_metadata(base.folder if base else None)
    languages = metadata.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    place = next(filter(has_tokenizer, (folder, records)), None)
    items = read_jsonl(records / EVAL_ITEMS) if compared else []
    return Records(
        folder=records,
        base=base,
        licence=read_licence(metadata, base, folder),
        languages=[language for language in languages if isinstance(language, str)],
        trained=record.trained,
        style=record.fitted_style(load_tokenizer(place)) if place else record.style,
        adapter=read_if_there(records / CONFIG),
        evaluation=evaluation if compared else {},
        items=[item for item in items if {"base", "adapter"} <= item.keys()],
        metrics=read_jsonl(records / METRICS),
        validation=read_jsonl(records / VALIDATION),
    )


def read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def lora_rank(adapter: dict[str, Any]) -> int:
    """Return the largest rank in an adapter's configuration, 0 where it has none."""
    return max([adapter.get("r", 0), *(adapter.get("rank_pattern") or {}).values()])


def is_hub_id(name: str) -> bool:
    """Return whether a model's or dataset's name is a Hub id, and not a file or folder."""
    is_file = is_data_file(Path(name)) or Path(name).exists()
    return HUB_ID.fullmatch(name) is not None and not is_file


def short_name(name: str) -> str:
    """Return a Hub id or a list of generators as it is, and of a local path the last part."""
    return name if is_hub_id(name) or name.startswith(PREFIX) else Path(name).name or name


def find_base(record: RunRecord, folder: Path) -> Base | None:
    """Return the base of what `folder` holds; None if nothing says it.

    A merge may have used another base than the run, so its report is asked first.
    """
    reports = (read_if_there(place / MERGED_FILE) for place in (folder, record.records))
    name = next(filter(None, (*(report.get("base") for report in reports), record.base)), None)
    if name is None:
        return None
    revision = record.revision if name == record.base else None
    path = Path(name).expanduser()
    local = path if path.is_dir() else None
    if name == EMBEDDED or (local and path.resolve() == EMBEDDED_FOLDER):
        return Base(EMBEDDED, None, None, EMBEDDED_FOLDER)
    if (published := public_name(path)) != str(path):
        return Base(published, published, path.name, local)
    if not is_hub_id(name):
        return Base(short_name(name), None, None, local)
    return Base(name, name, revision, find_snapshot(name, revision))


def find_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of a Hub model in the local cache, None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def read_metadata(folder: Path | None) -> dict[str, Any]:
    """Return the metadata of a model's README.md; nothing where it has none that can be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if folder is None or not (folder / "README.md").is_file():
        return {}
    try:
        return metadata_load(folder / "README.md") or {}
    except (ValueError, yaml.YAMLError):
        return {}


def read_licence(card: dict[str, Any], base: Base | None, folder: Path) -> Licence:
    """Return the base's licence: from its card's metadata, else from a LICENSE file of its own, or
    of `folder` where a merge put it."""
    found = {name: card[name] for name in LICENCE_KEYS if isinstance(card.get(name), str)}
    if "license" in found:
        link = found.get("license_link", "")
        if link and "://" not in link and not (folder / link).is_file():
            del found["license_link"]
            if base.hub_id:
                page = f"https://huggingface.co/{base.hub_id}/blob/{base.revision or 'main'}"
                found["license_link"] = f"{page}/{link}"
        return Licence(found, "the base's card")
    places = filter(None, (base.folder if base else None, folder))
    path = next((path for place in places for path in sorted(place.glob("LICENSE*"))), None)
    if path is None:
        return Licence({}, "")
    text = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split())
    known = [name for name, sentence in LICENCE_TEXTS.items() if sentence in text]
    return Licence({"license": known[0]} if len(known) == 1 else {}, f"its file `{path.name}`")
