"""What a card may say: everything that a run left on record, read once."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.data.prompt import Message, PromptStyle, build_messages
from lora_grpo.data.tables import is_data_file
from lora_grpo.machine.files import read_jsonl
from lora_grpo.policy.adapter import CONFIG, has_tokenizer, read_record, read_train_config
from lora_grpo.policy.base import EMBEDDED, EMBEDDED_FOLDER, load_tokenizer, public_name
from lora_grpo.results.markdown import code, flatten

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
HUB = "https://huggingface.co"
MERGE_REPORT = "merge_report.json"
# A sentence that a licence's text holds, white space and case apart.
LICENCE_TEXTS = {
    "apache-2.0": "apache license version 2.0, january 2004",
    "mit": "permission is hereby granted, free of charge, to any person obtaining a copy",
}


@dataclass(frozen=True)
class Base:
    """A base model: `name` is fit to be published, `folder` is None where it is not on this
    machine."""

    name: str
    hub_id: str | None
    revision: str | None
    folder: Path | None


@dataclass(frozen=True)
class Licence:
    """A base's licence as metadata, empty where it is not known, and as sentences."""

    metadata: dict[str, str]
    text: str


def is_hub_id(name: str) -> bool:
    """Tell whether a model's or dataset's name is a Hub id, and not a file or folder."""
    is_file = is_data_file(Path(name)) or Path(name).exists()
    return HUB_ID.fullmatch(name) is not None and not is_file


def short_name(name: str) -> str:
    """Return a Hub id as it is, and of a local path the last part."""
    return name if is_hub_id(name) else Path(name).name or name


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds, an empty one where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_base(records: Path, folder: Path) -> Base | None:
    """Return the base of what `folder` holds, made by the run of `records`; None if neither says.

    A merge may have used another base than the run, so its report is asked first.
    """
    trained = read_train_config(records)
    reports = (read_object(place / MERGE_REPORT).get("base") for place in (folder, records))
    adapter = read_object(records / CONFIG)
    name = next(filter(None, (*reports, trained.get("model"))), None)
    if name is None:
        name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    else:
        revision = trained.get("revision") if name == trained.get("model") else None
    return describe_base(name, revision) if name else None


def describe_base(name: str, revision: str | None) -> Base:
    """Return a base by the name that a record has for it: a Hub id, a folder or `tiny`."""
    path = Path(name).expanduser()
    if name == EMBEDDED or (path.is_dir() and path.resolve() == EMBEDDED_FOLDER):
        return Base(EMBEDDED, None, None, EMBEDDED_FOLDER)
    published = public_name(path)
    if published != str(path):
        return Base(published, published, path.name, path if path.is_dir() else None)
    if not is_hub_id(name):
        return Base(short_name(name), None, None, path if path.is_dir() else None)
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


def read_languages(base: Base | None) -> list[str]:
    """Return the language codes that the base's card names."""
    found = read_metadata(base.folder if base else None).get("language")
    codes = found if isinstance(found, list) else [found]
    return [language for language in codes if isinstance(language, str)]


def read_licence(base: Base | None, folder: Path) -> Licence:
    """Return the base's licence: from its card, else from a LICENSE file of its own, or of `folder`
    where a merge put it."""
    metadata = read_metadata(base.folder if base else None)
    if isinstance(metadata.get("license"), str):
        return licence_of_card(metadata, base, folder)
    places = [place for place in (base.folder if base else None, folder) if place]
    files = [path for place in places for path in sorted(place.glob("LICENSE*"))]
    if files:
        return licence_of_file(files[0])
    where = f"its page, {HUB}/{base.hub_id}" if base and base.hub_id else "where the base came from"
    return Licence(
        {},
        "The base's licence is not known: with the base there was neither a card that names one "
        f"nor a LICENSE file. Look at {where} before you pass these weights on.",
    )


def licence_of_card(metadata: dict[str, Any], base: Base, folder: Path) -> Licence:
    names = ("license", "license_name", "license_link")
    found = {name: metadata[name] for name in names if isinstance(metadata.get(name), str)}
    link = found.get("license_link", "")
    if link and "://" not in link and not (folder / link).is_file():
        del found["license_link"]
        if base.hub_id:
            found["license_link"] = f"{HUB}/{base.hub_id}/blob/{base.revision or 'main'}/{link}"
    name = found.get("license_name", found["license"])
    where = f" ({found['license_link']})" if "license_link" in found else ""
    return Licence(found, f"The base's licence is {code(name)}{where}, as the base's card says.")


def licence_of_file(path: Path) -> Licence:
    text = flatten(path.read_text(encoding="utf-8", errors="replace"))
    known = [name for name, sentence in LICENCE_TEXTS.items() if sentence in text.lower()]
    if len(known) == 1:
        sentence = f"The base's licence is {code(known[0])}, as its file {code(path.name)} says."
        return Licence({"license": known[0]}, sentence)
    return Licence(
        {},
        f"The base comes with a licence, {code(path.name)}, that begins {code(text[:80])}: read it "
        "before you pass these weights on.",
    )


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
