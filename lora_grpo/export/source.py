"""What an export starts from, and what it makes of it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.data.prompt import PromptStyle
from lora_grpo.machine.files import read_json
from lora_grpo.machine.folders import MERGED_FILE, check_kind
from lora_grpo.machine.terminal import join
from lora_grpo.merge.inputs import MergePlan, plan_merge, read_base, read_style
from lora_grpo.merge.write import TOKENIZER_FILES
from lora_grpo.policy.adapter import ADAPTERS, CONFIG, RunRecord, has_tokenizer, read_record
from lora_grpo.proof.checks import Check

if TYPE_CHECKING:
    from lora_grpo.export.config import ExportConfig

HERE = Path()
SYSTEM_PROMPT = "system_prompt.txt"
Command = tuple[str | Path, ...]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What is exported, and the record of the run that it came from.

    `merged` is the plain 16-bit folder that every format is made of; until the merge is made it is
    the base, which has the same config. `plan` says what is merged, None for a folder that is
    merged already.
    """

    name: str
    merged: Path
    tokenizer_folder: Path
    record: RunRecord
    style: PromptStyle
    plan: MergePlan | None = None


@dataclass(frozen=True)
class ExportedFormat:
    """The checks of one exported format, its figures, and the commands that run it; a path in a
    command is one inside the format's folder."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]
    commands: tuple[Command, ...] = ()

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def commands_in(self, folder: Path) -> list[str]:
        """Return the commands as they are typed, for the format's folder there."""
        return [
            join(*(folder / word if isinstance(word, Path) else word for word in command))
            for command in self.commands
        ]


def inspect_source(config: "ExportConfig") -> Source:
    """Check an adapter and its base, or a merged folder, and return what is to be exported.

    Raises:
        ValueError, FileNotFoundError: it is neither, or cannot be merged.
    """
    folder = config.source
    wanted = "an adapter directory or a merged model"
    check_kind(folder, "export_model.py", wanted, (*ADAPTERS, "merged", "model"))
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        check_merged(config)
        record = read_record(folder)
        return Source(config.name, folder, folder, record, read_style(record, folder))
    plan = plan_merge(folder, config.model, config.base)
    place = plan.tokenizer_folder
    return Source(config.name, plan.base_folder, place, plan.record, plan.style, plan)


def check_merged(config: "ExportConfig") -> None:
    """Raise a ValueError unless a folder is a plain model whose merge, if it has one on record, was
    proven."""
    folder = config.source
    read_base(folder)
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer: give a folder that merge_adapter.py wrote")
    report = folder / MERGED_FILE
    if report.is_file() and not read_json(report).get("passed"):
        raise ValueError(f"{report} says that the merge failed its proof: merge again")
    for flag, given in (("--model", config.model), ("--base", config.base != "original")):
        if given:
            raise ValueError(f"{flag} is for adapters, {folder} is merged already: leave it out")
    for name in ("safetensors", "gguf-adapter"):
        if name in config.formats:
            raise ValueError(
                f"--format {name} needs an adapter directory, {folder} is a merged folder"
            )


def copy_companions(source: Source, folder: Path) -> None:
    """Put tokenizer, template, generation config, licence and system prompt beside the weights."""
    names = [*TOKENIZER_FILES, "generation_config.json"]
    copied = [source.merged / name for name in names] + list(source.merged.glob("LICENSE*"))
    for path in filter(Path.is_file, copied):
        shutil.copyfile(path, folder / path.name)
    (folder / SYSTEM_PROMPT).write_text(source.style.system_prompt, encoding="utf-8")
