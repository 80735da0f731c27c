"""What answers in a chat or behind a server: an adapter on its base, or a merged model.

A folder and its record go in; out comes what to load and how it was asked in training. Reads no
weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.machine.files import read_jsonl
from lora_grpo.machine.folders import MODEL_FILE
from lora_grpo.policy.adapter import CONFIG, EVAL_ITEMS, RunRecord, check_adapter, read_record
from lora_grpo.policy.base import check_architecture, fit_padding, load_tokenizer
from lora_grpo.tasks.task import NUMBER_TASK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_grpo.data.prompt import PromptStyle
    from lora_grpo.tasks.task import Task


@dataclass(frozen=True)
class ChatSource:
    """A run's record with what was found for it: `weights` is the folder of the base, or of the
    merged model itself."""

    record: RunRecord
    base: str | None
    weights: Path
    tokenizer_folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    load_in_4bit: bool

    @property
    def folder(self) -> Path:
        return self.record.folder

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def adapter_dir(self) -> Path | None:
        return self.folder if self.record.is_adapter else None

    @property
    def style(self) -> "PromptStyle":
        return self.record.fitted_style(self.tokenizer)

    @property
    def task(self) -> "Task":
        """What reads the answers; where the file of the run's own task is gone, the answer tags."""
        task = self.style.task
        try:
            task.check()
        except (FileNotFoundError, ValueError):
            return NUMBER_TASK
        return task

    def describe(self) -> str:
        """Return what answers, in a few words."""
        held = ", in 4-bit NF4" if self.load_in_4bit else ""
        if self.adapter_dir is None:
            return f"{self.folder}, a whole model{held}"
        return f"{self.folder}, an adapter on {self.base}{held}"

    def sample_question(self) -> str:
        """Return the first question that the run was evaluated on, or a plain one."""
        rows = read_jsonl(self.record.records / EVAL_ITEMS)
        return rows[0]["question"] if rows else "What is 2 + 3?"


def find_source(
    folder: Path,
    model: str | None = None,
    load_in_4bit: bool | None = None,
    script: str = "chat.py",
) -> ChatSource:
    """Return what a folder holds; `model` replaces the base that an adapter remembers.

    Raises:
        FileNotFoundError, ValueError: it holds neither an adapter nor a whole model, it is a
        checkpoint, or its base cannot be found.
    """
    if (folder / MODEL_FILE).is_file() and not (folder / CONFIG).is_file():
        check_whole_model(folder, model)
        record, weights, base = read_record(folder), folder, None
    else:
        record = read_record(check_adapter(folder, script))
        weights, base = record.find_base(model), model or record.base
    tokenizer_folder = record.tokenizer_folder(weights)
    tokenizer = load_tokenizer(tokenizer_folder)
    fit_padding(tokenizer, weights)
    if load_in_4bit is None:
        load_in_4bit = record.load_in_4bit and record.is_adapter
    return ChatSource(record, base, weights, tokenizer_folder, tokenizer, load_in_4bit)


def check_whole_model(folder: Path, model: str | None) -> None:
    if model is not None:
        raise ValueError(
            f"--model names the base of an adapter, and {folder} is a whole model: leave it out"
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no *.safetensors: give a merged model such as merged/<run>, which "
            "merge_adapter.py writes"
        )
    check_architecture(folder)
