"""Model cards: README.md of an adapter directory, of a merged folder and of an export.

A card says only what is on record, and leaves out what is not. It holds no path of this machine:
what is local goes by the last part of its name.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.machine.files import write_text
from lora_grpo.policy.base import EMBEDDED
from lora_grpo.results.curves import CURVES, write_curves
from lora_grpo.results.markdown import code, escape, table
from lora_grpo.results.metadata import Kind, build_metadata, write_yaml
from lora_grpo.results.records import Records, read_records, short_name
from lora_grpo.results.sections import (
    write_command,
    write_evaluation,
    write_limits,
    write_prompt,
    write_samples,
    write_settings,
)
from lora_grpo.results.usage import use_adapter

CARD = "README.md"
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin")


@dataclass(frozen=True)
class CardNote:
    """What the maker of a folder adds to its card; `use` and `proof` are Markdown."""

    title: str
    kind: Kind
    library_name: str
    summary: str
    use: str
    proof: str


def write_adapter_card(run_dir: Path) -> None:
    """Write `README.md` and `curves.png` into an adapter directory, from what it holds."""
    records, name = read_records(run_dir, run_dir), run_dir.resolve().name
    note = CardNote(
        title=name,
        kind="adapter",
        library_name="peft",
        summary=describe_adapter(records),
        use=use_adapter(records, name),
        proof="",
    )
    write_page(run_dir, records, note)


def write_model_card(folder: Path, records: Path, note: CardNote) -> None:
    """Write `README.md` into a merged or exported folder, and the curves of its run.

    `records` is the folder with the run's records: the adapter directory, or a merged folder.
    """
    write_page(folder, read_records(records, folder), note)


def write_page(folder: Path, records: Records, note: CardNote) -> None:
    metadata = build_metadata(records, note.kind, note.library_name, note.title)
    curves = f"![Curves of the training run]({CURVES})" if write_curves(records, folder) else ""
    training = [write_settings(records), curves]
    sections = {
        "Use": note.use,
        "Prompt": write_prompt(records),
        "Evaluation": write_evaluation(records, note.kind),
        "Sample answers of the adapter": write_samples(records),
        "Proof": note.proof,
        "Training": "\n\n".join(part for part in training if part),
        "Reproduce": write_command(records),
        "Files": list_weights(folder),
        "Licence": records.licence.text,
        "Limits": write_limits(records),
    }
    body = [f"# {escape(note.title)}", note.summary]
    body += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    header = f"---\n{write_yaml(metadata)}\n---\n\n"
    write_text(folder / CARD, header + "\n\n".join(body) + "\n")


def describe_adapter(records: Records) -> str:
    base = f" for {code(records.base.name)}" if records.base else ""
    if records.base and records.base.name == EMBEDDED:
        base += ", the small model that comes with lora-grpo"
    dataset = records.trained.get("dataset")
    trained = f", trained with GRPO on {code(short_name(dataset))} by lora-grpo" if dataset else ""
    kind = "A LoRA adapter" if records.adapter.get("peft_type") == "LORA" else "An adapter"
    return f"{kind}{base}{trained}."


def list_weights(folder: Path) -> str | None:
    """Return the weight files with their sizes and hashes."""
    paths = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    if not paths:
        return None
    rows = [(code(path.name), f"{path.stat().st_size:,}", code(sha256(path))) for path in paths]
    return table(("file", "bytes", "sha256"), rows)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
