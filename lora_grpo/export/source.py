"""What an export starts from, and what it makes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.data.prompt import PromptStyle
from lora_grpo.machine.files import read_json
from lora_grpo.machine.folders import MERGED_FILE, check_kind
from lora_grpo.machine.terminal import join
from lora_grpo.merge.inputs import MergePlan, plan_merge, read_base, read_style
from lora_grpo.policy.adapter import ADAPTERS, CONFIG, has_tokenizer, read_record
from lora_grpo.proof.checks import Check

if TYPE_CHECKING:
    from lora_grpo.export.config import ExportConfig

HERE = Path()
Command = tuple[str | Path, ...]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What is exported, and the run that it came from.

    `merged` is the plain 16-bit folder that every format is made of; until the merge is made it is
    the base, which has the same config. `records` is the folder with the run's records. `plan` says
    what is merged, None for a folder that is merged already.
    """

    name: str
    merged: Path
    tokenizer_folder: Path
    records: Path
    style: PromptStyle
    plan: MergePlan | None = None


@dataclass(frozen=True)
class ExportedFormat:
    """The checks of one exported format, its figures, and the commands that run it; a path in a
    command is one inside the format's folder."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]
    commands: tuple[Command, ...]

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
        return Source(config.name, folder, folder, folder, read_style(read_record(folder), folder))
    plan = plan_merge(folder, config.model, config.base)
    return Source(config.name, plan.base_folder, plan.tokenizer_folder, folder, plan.style, plan)


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
