"""What of a folder is published: an allow-list of files, without paths of this machine in them.

A folder goes in; names with content and hashes, as the Hub lists them, come out.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

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
# Prompts, in which a leading "/" is no path: Qwen3 reads "/no_think".
PROMPTS = ("system_prompt", "example")
BLOCK = 1 << 20


@dataclass(frozen=True)
class Published:
    """One file as it will lie in the repository: a path as it is, or bytes with paths taken out."""

    name: str
    path: Path
    data: bytes | None
    size: int
    sha256: str
    blob_id: str

    @property
    def content(self) -> Path | bytes:
        return self.path if self.data is None else self.data


def list_adapter(folder: Path) -> list[Published]:
    """Return what is published of an adapter directory; no checkpoint, no other step's weights."""
    names = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    names += sorted(path.name for path in folder.glob("LICENSE*"))
    return [publish(folder / name) for name in names]


def list_folder(folder: Path) -> list[Published]:
    """Return what is published of a merged or exported folder: all but hidden files."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [publish(path) for path in paths if not path.name.startswith(".")]


def publish(path: Path) -> Published:
    """Return a file as it will be published."""
    data = strip_paths(path) if path.name in RECORDS else None
    sha256, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    size = path.stat().st_size if data is None else len(data)
    blob.update(f"blob {size}\0".encode())
    for block in read_blocks(path) if data is None else [data]:
        sha256.update(block)
        blob.update(block)
    return Published(path.name, path, data, size, sha256.hexdigest(), blob.hexdigest())


def read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def strip_paths(path: Path) -> bytes | None:
    """Return a JSON file with each path of this machine shortened to its last part, or None where
    it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return None
    shortened = shorten(value)
    if shortened == value:
        return None
    return (json.dumps(shortened, indent=2, ensure_ascii=False) + "\n").encode()


def shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: entry if key in PROMPTS else shorten(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shorten(entry) for entry in value]
    if isinstance(value, str) and "\n" not in value and is_local_path(value):
        return PurePath(value).name
    return value


def is_local_path(text: str) -> bool:
    """Tell whether a text is a path of this machine: absolute, from the home folder, or one that
    leads out of the working folder."""
    return text.startswith(("/", "~/", "../", "./")) or text[1:3] == ":\\"
