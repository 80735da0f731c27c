"""The adapter directory that a run writes: the one argument of evaluate, merge, export, push, chat
and resume. It records its base model, so they need nothing else.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PLAIN, PromptStyle, fit_style
from lora_grpo.machine.files import STAGED, read_json
from lora_grpo.machine.folders import check_kind
from lora_grpo.policy.base import EMBEDDED, EMBEDDED_FOLDER, resolve_model
from lora_grpo.rewards.own_task import recall_task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAIN_CONFIG = "train_config.json"
TOKENIZER_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json")
ADAPTERS = ("run", "adapter", "last", "other")
METADATA = "__metadata__"
LOGS = METRICS, COMPLETIONS, VALIDATION = "metrics.jsonl", "completions.jsonl", "validation.jsonl"
START = "start"  # the folder of the adapter that GRPO started from
EVAL, EVAL_ITEMS = "eval.json", "eval_items.jsonl"


def check_adapter(directory: Path, script: str, *kinds: str) -> Path:
    """Return the directory if it holds a complete adapter. `kinds` are the kinds of folder (of
    `folders.KINDS`) that the script accepts besides an adapter directory.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken; the message says which
        directory to give instead.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"adapter directory {directory} does not exist: give one that train_lora.py wrote"
        )
    check_kind(directory, script, "an adapter directory", (*ADAPTERS, *kinds))
    missing = [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
    if missing:
        inside = sorted(path.parent.name for path in directory.glob(f"*/{WEIGHTS}"))
        hint = f"give {directory / inside[0]}" if inside else "give one that train_lora.py wrote"
        raise FileNotFoundError(
            f"{directory} is not an adapter directory, it has no {' and no '.join(missing)}: {hint}"
        )
    read_json(directory / CONFIG)
    check_whole(directory / WEIGHTS)
    return directory


def check_whole(weights: Path) -> None:
    """Raise a ValueError for a file that is not a complete safetensors file."""
    try:
        with weights.open("rb") as file:
            header = read_header(file)
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != METADATA]
            if file.tell() + max(ends, default=0) != weights.stat().st_size:
                raise ValueError("its size is not what its header says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{weights} is no whole safetensors file ({error}): fetch or write it again"
        ) from error


def read_train_config(directory: Path) -> dict[str, Any]:
    """Return the contents of `train_config.json`; nothing for a plain PEFT directory."""
    path = directory / TRAIN_CONFIG
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class RunRecord:
    """What a folder records about the run that it comes from: its base model and its prompts.

    `folder` holds an adapter or a full model; `records` is the folder of the run's own files, which
    for `last` and checkpoints is the run directory. Without a record, the base is loaded as it is
    stored and gets the built-in prompt. `trained` is all of `train_config.json`.
    """

    folder: Path
    records: Path
    is_adapter: bool
    base: str | None
    revision: str | None
    base_sha256: str | None
    base_named_in: Path
    load_in_4bit: bool
    quant_type: str
    double_quant: bool
    dtype: str | None
    style: PromptStyle
    max_completion_length: int
    trained: dict[str, Any]

    def find_base(self, model: str | None = None, weights: bool = True) -> Path:
        """Return the folder of the base, or of `model` if given; see `resolve_model`.

        Raises:
            FileNotFoundError, ValueError: no base is recorded, or it cannot be found.
        """
        if model is not None:
            return resolve_model(model, weights=weights)
        if self.base is None:
            raise ValueError(
                f"{self.folder} does not say which base it belongs to: name it with --model"
            )
        return resolve_model(self.base, self.revision, weights, self.base_named_in)

    def tokenizer_folder(self, base: Path) -> Path:
        """Return the folder of the tokenizer and chat template: the adapter's, the run's or the
        base's, whichever has them first."""
        return next(filter(has_tokenizer, (self.folder, self.records)), base)

    def fitted_style(self, tokenizer: "PreTrainedTokenizerBase") -> PromptStyle:
        """Return the run's prompt style, adapted to what the tokenizer's chat template supports."""
        return fit_style(tokenizer, self.style)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_CORE)


def find_records(folder: Path) -> Path:
    """Return the folder of the run's records: the folder itself, or for `last` and a checkpoint
    the run directory."""
    run_dir, name = folder.resolve().parent, folder.resolve().name
    is_part = name == "last" or name.startswith("checkpoint-")
    return run_dir if is_part and (run_dir / TRAIN_CONFIG).is_file() else folder


def read_record(folder: Path) -> RunRecord:
    """Return what an adapter directory or a model folder records about its run.

    Raises:
        ValueError: one of its records is not JSON.
    """
    records = find_records(folder)
    trained = read_train_config(records)
    adapter = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    named_by_run = bool(trained.get("model"))
    example = trained.get("example")
    return RunRecord(
        folder=folder,
        records=records,
        is_adapter=bool(adapter),
        base=trained["model"] if named_by_run else adapter.get("base_model_name_or_path"),
        revision=(trained if named_by_run else adapter).get("revision"),
        base_sha256=trained.get("base_sha256"),
        base_named_in=records / TRAIN_CONFIG if named_by_run else folder / CONFIG,
        load_in_4bit=bool(trained.get("load_in_4bit")),
        quant_type=trained.get("bnb_4bit_quant_type") or "nf4",
        double_quant=trained.get(
            "bnb_4bit_use_double_quant", TrainConfig.bnb_4bit_use_double_quant
        ),
        dtype=trained.get("dtype"),
        style=PromptStyle(
            trained["system_prompt"],
            Problem(**example) if example else None,
            task=recall_task(trained),
        )
        if "system_prompt" in trained
        else PLAIN,
        max_completion_length=trained.get(
            "max_completion_length", TrainConfig.max_completion_length
        ),
        trained=trained,
    )


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of a model folder's safetensors files in the order of their names, or of
    its .bin files if it has none."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def save_adapter(model: "PeftModel", directory: Path, step: int | None = None) -> None:
    """Write PEFT's two files into the directory, each atomically, over those of an earlier step.

    The step is recorded in the weights file itself, so that the two always belong together.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f"{STAGED}adapter.") as staged:
        # No embedding is adapted; by default PEFT would ask the Hub about that at every call.
        model.save_pretrained(staged, save_embedding_layers=False, selected_adapters=["default"])
        name_embedded_base(Path(staged))
        if step is not None:
            write_step(Path(staged) / WEIGHTS, step)
        for name in (CONFIG, WEIGHTS):
            (Path(staged) / name).chmod(0o644)
            os.replace(Path(staged) / name, directory / name)


def load_weights(model: "PeftModel", weights: Path) -> None:
    """Put the weights of a saved adapter into the model's adapter of the same shape."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(weights))


def name_embedded_base(directory: Path) -> None:
    """Replace the embedded model's path in what PEFT wrote by its name, as in `--model tiny`."""
    for name in (CONFIG, "README.md"):
        path = directory / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(str(EMBEDDED_FOLDER), EMBEDDED), encoding="utf-8")


def write_step(weights: Path, step: int) -> None:
    """Add the training step to the metadata of a safetensors file.

    safetensors' own writer would order the two entries differently from one process to the next;
    the same adapter has to be the same file, byte for byte.
    """
    named = weights.with_suffix(".named")
    with weights.open("rb") as source, named.open("wb") as target:
        header = read_header(source) | {METADATA: {"format": "pt", "step": str(step)}}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target)
    named.replace(weights)


def read_step(weights: Path) -> int | None:
    """Return the training step in a safetensors file's metadata, or None."""
    with weights.open("rb") as file:
        step = read_header(file).get(METADATA, {}).get("step")
    return None if step is None else int(step)


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Return the header of an open safetensors file, leaving the file at its first tensor."""
    return json.loads(file.read(int.from_bytes(file.read(8), "little")))
