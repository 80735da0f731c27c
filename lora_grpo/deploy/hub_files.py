"""Which files of a folder are published: an allow-list, without paths of this machine in them.

A folder goes in; names with content and hashes, as the Hub lists them, come out. Paths in texts are
cut to their last part; a file of another kind that holds one is refused.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from lora_grpo.machine.terminal import FailedError
from lora_grpo.policy.adapter import EVAL_ITEMS, TRAIN_CONFIG
from lora_grpo.policy.base import public_name
from lora_grpo.results.card import hub_place


class PushError(FailedError):
    """The Hub failed, or does not hold what was sent; the message says what to do."""


class PushRefused(ValueError):
    """The user said no, or could not be asked; nothing was changed."""


ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "train_config.json",
    "metrics.jsonl",
    "validation.jsonl",
    "completions.jsonl",
    "eval.json",
    "eval_items.jsonl",
    "README.md",
    "curves.png",
    "report.html",
)
# Where a run or a tool writes down paths; a tokenizer's "/" is none.
RECORDS = (
    "adapter_config.json",
    "config.json",
    "train_config.json",
    "eval.json",
    "merge_report.json",
    "export_report.json",
)
CARD = "README.md"
# Tokens may look like paths.
TOKENS = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
TEXTS = (".json", ".jsonl", ".md", ".txt", ".html", ".jinja")
# What a user wrote or a model answered, beside figures and weights.
OWN_DATA = {
    "train_config.json": "system prompt, names of data files",
    "completions.jsonl": "training prompts and completions",
    "eval_items.jsonl": "test questions, gold answers and completions",
    "report.html": "sample prompts and completions",
    "system_prompt.txt": "system prompt",
    CARD: "sample questions and completions",
}
# Two parts or more: `/no_think` is none.
NAME = r"[^\s/\\\"'`<>|:*?()\[\],;]+"
PATH = re.compile(
    rf"(?<![\w/.~<])(?:(?:file://|~)?(?:/(?!/){NAME}){{2,}}|[A-Za-z]:(?:[/\\]{NAME}){{2,}})"
)
SYSTEM = ("bin", "dev", "etc", "lib", "opt", "proc", "sbin", "sys", "usr")
# Prompts, in which a leading "/" is no path: Qwen3 reads "/no_think".
PROMPTS = ("system_prompt", "example")
BLOCK, LONGEST_PATH = 1 << 20, 4096


@dataclass(frozen=True)
class Published:
    """One file as it will lie in the repository: a path as it is, or bytes with paths taken out."""

    name: str
    path: Path
    data: bytes | None
    size: int
    sha256: str
    blob_id: str

    def read(self) -> bytes:
        """Return the content as it will be published."""
        return self.path.read_bytes() if self.data is None else self.data


def describe_file(file: Published) -> str:
    """Return which of a user's own data a file holds, and what was changed in it."""
    sampled = file.name != CARD or file.path.with_name(EVAL_ITEMS).is_file()
    notes = [f"your own: {OWN_DATA[file.name]}"] if file.name in OWN_DATA and sampled else []
    notes += ["without local paths"] if file.data is not None else []
    return f"  ({'; '.join(notes)})" if notes else ""


def list_adapter(folder: Path, repo: str) -> list[Published]:
    """Return what is published of an adapter directory; no checkpoint, no other step's weights."""
    names = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    names += sorted(path.name for path in folder.glob("LICENSE*"))
    secrets = find_paths(folder)
    return [publish(folder / name, secrets, repo) for name in names]


def list_folder(folder: Path, repo: str) -> list[Published]:
    """Return what is published of a merged or exported folder: all but hidden files."""
    paths, secrets = sorted(path for path in folder.iterdir() if path.is_file()), find_paths(folder)
    return [publish(path, secrets, repo) for path in paths if not path.name.startswith(".")]


def publish(path: Path, secrets: list[str], repo: str) -> Published:
    """Return a file as it will be published; `secrets` are paths that it may not hold, `repo` is
    what its card's code then loads.

    Raises:
        ValueError: it is no text, and holds one.
    """
    data = clean_file(path, secrets)
    if path.name == CARD:
        text = path.read_bytes() if data is None else data
        place = hub_place(path.parent.resolve().name)
        named = text.replace(json.dumps(place, ensure_ascii=False).encode(), f'"{repo}"'.encode())
        data = named if named != text else data
    sha256, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    size = path.stat().st_size if data is None else len(data)
    blob.update(f"blob {size}\0".encode())
    end = b""
    for block in read_blocks(path) if data is None else [data]:
        sha256.update(block)
        blob.update(block)
        if found := [text for text in secrets if text.encode() in end + block]:
            raise ValueError(
                f"{path} holds {found[0]}, a path of this machine: write the file without it, or "
                "move it away"
            )
        end = block[-LONGEST_PATH:]
    return Published(path.name, path, data, size, sha256.hexdigest(), blob.hexdigest())


def read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def find_paths(folder: Path) -> list[str]:
    """Return the paths of this machine that a folder's files may hold, the longest first: its own,
    the working and the home folder, those in its records, and the folders that these lie in."""
    found = {folder.resolve(), folder.absolute(), Path.cwd(), Path.home()}
    texts: list[str] = []
    for path in (folder / name for name in RECORDS):
        if path.is_file():
            with suppress(ValueError):
                map_strings(json.loads(path.read_bytes()), lambda text: texts.append(text) or text)
    found |= {Path(text) for text in texts if is_local_path(text)}
    folders = {parent for path in found for parent in (path, *path.parents)}
    private = {str(path) for path in folders if path.is_absolute() and is_private(path)}
    return sorted(private, key=len, reverse=True)


def is_private(path: Path) -> bool:
    """Return whether a path says something about one machine: `/usr/lib` and `/tmp` do not."""
    return len(path.parts) > 2 and path.parts[1] not in SYSTEM


def map_strings(value: Any, change: Callable[[str], str], whole: bool = False) -> Any:
    """Return a JSON value with its strings changed, except prompts unless it is the `whole`."""
    if isinstance(value, dict):
        return {
            key: entry if key in PROMPTS and not whole else map_strings(entry, change, whole)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [map_strings(entry, change, whole) for entry in value]
    return change(value) if isinstance(value, str) else value


def clean_file(path: Path, secrets: list[str]) -> bytes | None:
    """Return a text file's bytes with each path of this machine shortened to its last part, or None
    where it holds none."""
    if path.suffix not in TEXTS or path.name in TOKENS:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    if path.suffix == ".json":
        cleaned = clean_json(text, secrets, path.name in RECORDS)
    elif path.suffix == ".jsonl":
        cleaned = "\n".join(clean_json(line, secrets) for line in text.split("\n"))
    else:
        foreign = path.name == CARD and not (path.parent / TRAIN_CONFIG).is_file()
        cleaned = clean_text(clean_metadata(text) if foreign else text, secrets, foreign)
    return None if cleaned == text else cleaned.encode()


def clean_json(text: str, secrets: list[str], is_record: bool = False) -> str:
    """Return JSON with its strings cleaned; in a record each value that is one path is shortened,
    also one of another machine."""
    try:
        value = json.loads(text)
    except ValueError:
        return clean_text(text, secrets)
    cleaned = map_strings(value, shorten) if is_record else value
    cleaned = map_strings(cleaned, lambda part: clean_text(part, secrets), whole=True)
    if cleaned == value:
        return text
    indent, end = (2, "\n") if "\n" in text.strip() else (None, "")
    return json.dumps(cleaned, indent=indent, ensure_ascii=False) + end


def shorten(text: str) -> str:
    return last_part(text) if "\n" not in text and is_local_path(text) else text


def clean_text(text: str, secrets: list[str], foreign: bool = False) -> str:
    """Return text with its paths shortened: those of this machine, in a `foreign` card all."""
    if known := "|".join(map(re.escape, secrets)):
        text = re.sub(rf"(?:{known})(?:[/\\]{NAME})*", lambda found: last_part(found[0]), text)
    return PATH.sub(
        lambda found: (
            last_part(found[0])
            if foreign or is_here(found[0].removeprefix("file://"))
            else found[0]
        ),
        text,
    )


@cache
def is_here(text: str) -> bool:
    """Return whether a path, or the private folder that it lies in, is on this machine."""
    path = Path(text).expanduser()
    try:
        return any(is_private(place) and place.exists() for place in (path, path.parent))
    except OSError:  # too long a name
        return False


def last_part(path: str) -> str:
    """Return a path's last part, or the Hub id that a snapshot's folder stands for."""
    published = public_name(Path(path))
    return PurePath(path.replace("\\", "/")).name if published == str(Path(path)) else published


def clean_metadata(card: str) -> str:
    """Return a card without local paths in its metadata: what PEFT writes of a local base, which
    the Hub would look for under that name."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return card
    if not isinstance(metadata, dict):
        return card
    kept = {key: drop_paths(value) for key, value in metadata.items()}
    kept = {key: value for key, value in kept.items() if value not in (None, [])}
    if kept == metadata:
        return card
    header = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{card[found.end() :]}"


def drop_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [entry for entry in map(drop_paths, value) if entry is not None]
    holds_path = isinstance(value, str) and (
        is_local_path(value) or PATH.search(value.rpartition(":")[2])
    )
    return None if holds_path else value


def is_local_path(text: str) -> bool:
    """Return whether a text is a path of this machine: absolute, from the home folder, or one that
    leads out of the working folder."""
    return text.startswith(("/", "~/", "../", "./")) or text[1:3] == ":\\"
