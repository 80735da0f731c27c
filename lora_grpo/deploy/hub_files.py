"""Which files of a folder are published, without paths of this machine in them.

A folder goes in; names with content and hashes, as the Hub lists them, come out. Paths in texts are
cut to their last part; a file of another kind that holds one is refused.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.machine.files import read_json
from lora_grpo.machine.terminal import FailedError
from lora_grpo.policy.adapter import CONFIG, TRAIN_CONFIG
from lora_grpo.policy.base import public_name
from lora_grpo.results.card import CARD, SAMPLE_MARKS, SAMPLES_HEADING, hub_place


class PushError(FailedError):
    """The Hub failed, or does not hold what was sent; the message says what to do."""


class PushRefused(ValueError):
    """The user said no, or could not be asked; nothing was changed."""


ADAPTER_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "train_config.json", "metrics.jsonl"),
    *("validation.jsonl", "completions.jsonl", "eval.json", "eval_items.jsonl", CARD),
    *("curves.png", "report.html"),
)
# Where a run or a tool writes down paths; a tokenizer's "/" is none.
RECORDS = (
    *("adapter_config.json", "config.json", "train_config.json", "eval.json"),
    *("merge_report.json", "export_report.json"),
)
# Prompts, in which a leading "/" is no path: Qwen3 reads "/no_think".
PROMPTS = ("system_prompt", "example")
# Tokens may look like paths.
TOKENS = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
TEXTS = (".json", ".jsonl", ".md", ".txt", ".html", ".jinja")
# What a user wrote or a model answered, beside figures and weights.
OWN_DATA = {
    "train_config.json": "system prompt, worked example, names of data files",
    "completions.jsonl": "training prompts and completions",
    "eval_items.jsonl": "test questions, gold answers and completions",
    "report.html": "sample prompts and completions",
    "system_prompt.txt": "system prompt",
    CARD: "sample questions and completions",
}
SAMPLES = ("completions.jsonl", "eval_items.jsonl", "report.html")  # a run is whole without them
NAME = r"[^\s/\\\"'`<>|:*?()\[\],;]+"
# Any machine's path, of two parts or more.
PATH = re.compile(rf"(?<![\w/.~<])(?:file://|~)?/(?!/){NAME}(?:/{NAME})+")
SYSTEM = ("bin", "dev", "etc", "lib", "opt", "proc", "sbin", "sys", "usr")
BLOCK, LONGEST_PATH = 1 << 20, 4096


@dataclass(frozen=True)
class Published:
    """One file as it will lie in the repository: a path as it is, or bytes with paths taken out."""

    name: str
    path: Path
    data: bytes | None
    size: int
    sha256: str

    def read(self) -> bytes:
        """Return the content as it will be published."""
        return self.path.read_bytes() if self.data is None else self.data

    @property
    def own_data(self) -> str:
        """Which of a user's own data the file holds, if any."""
        if self.name == CARD and SAMPLES_HEADING not in self.read().decode(errors="replace"):
            return ""
        return OWN_DATA.get(self.name, "")

    def describe(self) -> str:
        """Return which of a user's own data the file holds, and what was changed in it."""
        notes = [f"your own: {self.own_data}"] if self.own_data else []
        if self.data is not None:
            notes.append("without local paths")
        return f"  ({'; '.join(notes)})" if notes else ""


def list_files(folder: Path, repo: str, samples: bool = True) -> list[Published]:
    """Return what is published of a folder: of an adapter directory the files on a list, and no
    checkpoint or other step's weights; of a merged or exported one all but hidden files. Without
    `samples` no questions and completions.

    Raises:
        ValueError: a file that is no text holds a path of this machine, or a card's samples cannot
            be taken out.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if (folder / CONFIG).is_file():
        licences = [name for name in names if name.startswith("LICENSE")]
        names = [*(name for name in ADAPTER_FILES if name in names), *licences]
    secrets = find_paths(folder)
    left_out = () if samples else SAMPLES
    return [
        publish(folder / name, secrets, repo, samples)
        for name in names
        if not name.startswith(".") and name not in left_out
    ]


def publish(path: Path, secrets: list[str], repo: str, samples: bool = True) -> Published:
    """Return a file as it will be published; `secrets` are paths that it may not hold, `repo` is
    what its card's code then loads."""
    data = clean_file(path, secrets, repo)
    if path.name == CARD and not samples:
        data = without_samples(path, path.read_bytes() if data is None else data)
    digest, size, end = hashlib.sha256(), 0, b""
    for block in read_blocks(path) if data is None else [data]:
        digest.update(block)
        size += len(block)
        if found := [text for text in secrets if text.encode() in end + block]:
            raise ValueError(
                f"{path} holds {found[0]}, a path of this machine: write the file without it, or "
                "move it away"
            )
        end = block[-LONGEST_PATH:]
    return Published(path.name, path, data, size, digest.hexdigest())


def read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def find_paths(folder: Path) -> list[str]:
    """Return the paths of this machine that a folder's files may hold, the longest first: its own,
    the working and the home folder, those in its records, and the folders that these lie in, each
    also as JSON writes it."""
    texts = {str(folder.resolve()), str(folder.absolute()), str(Path.cwd()), str(Path.home())}
    for record in (folder / name for name in RECORDS):
        if record.is_file():
            texts |= set(list_strings(read_json(record)))
    paths = {Path(text) for text in texts if text.startswith(("/", "~/", "../"))}
    paths |= {parent for path in paths if path.is_absolute() for parent in path.parents}
    private = {str(path) for path in paths if is_private(path)}
    written = {json.dumps(path, ensure_ascii=ascii)[1:-1] for path in private for ascii in (0, 1)}
    return sorted(private | written, key=len, reverse=True)


def is_private(path: Path) -> bool:
    """Return whether a path is of one machine: `/usr/lib`, `/tmp` and `..` are not."""
    if not path.is_absolute():
        return len(path.parts) > 1
    return len(path.parts) > 2 and path.parts[1] not in SYSTEM


def list_strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, except prompts."""
    if isinstance(value, dict):
        value = [entry for key, entry in value.items() if key not in PROMPTS]
    if isinstance(value, list):
        for entry in value:
            yield from list_strings(entry)
    elif isinstance(value, str):
        yield value


def clean_file(path: Path, secrets: list[str], repo: str) -> bytes | None:
    """Return a text file's bytes with each path of this machine shortened to its last part, or None
    where it is published as it is."""
    if path.suffix not in TEXTS or path.name in TOKENS:
        return None
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    # A card that this project did not write may name paths of another machine.
    is_foreign = path.name == CARD and not path.with_name(TRAIN_CONFIG).is_file()
    known = "|".join(map(re.escape, secrets))
    cleaned = clean_metadata(text) if is_foreign else text
    cleaned = re.sub(rf"(?:{known})(?:/{NAME})*", last_part, cleaned)
    cleaned = PATH.sub(last_part, cleaned) if is_foreign else cleaned
    if path.name == CARD:
        place = json.dumps(hub_place(path.parent.resolve().name), ensure_ascii=False)
        cleaned = cleaned.replace(place, f'"{repo}"')
    return None if cleaned == text else cleaned.encode()


def without_samples(path: Path, card: bytes) -> bytes:
    """Return a card without its sample answers.

    Raises:
        ValueError: it has some, and no marks around them.
    """
    opening, closing = (mark.encode() for mark in SAMPLE_MARKS)
    start, end = card.find(opening), card.rfind(closing)  # a sample may hold the mark itself
    if 0 <= start < end:
        card = card[:start] + card[end + len(closing) :].lstrip()
    if SAMPLES_HEADING.encode() in card:
        raise ValueError(
            f"{path} has a section {SAMPLES_HEADING!r} without the marks that --no-samples goes "
            "by: take the section out of the file"
        )
    return card


def describe_own_data(files: list[Published]) -> str:
    """Return which files hold data of the user's own, and the flag that leaves samples out."""
    own = [file.name for file in files if file.own_data]
    has_samples = any(name in (*SAMPLES, CARD) for name in own)
    hint = "; --no-samples leaves out all questions and completions" if has_samples else ""
    return f"data of your own is in {', '.join(own) or 'none of them'}{hint}"


def last_part(found: re.Match[str]) -> str:
    """Return a path's last part, or the Hub id that a snapshot's folder stands for."""
    path = Path(found[0])
    published = public_name(path)
    return path.name if published == str(path) else published


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
    kept = {}
    for key, value in metadata.items():
        if isinstance(value, list):
            value = [entry for entry in value if not PATH.search(str(entry).rpartition(":")[2])]
        if value and not PATH.search(str(value)):
            kept[key] = value
    header = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return card if kept == metadata else f"---\n{header}---\n{card[found.end() :]}"
