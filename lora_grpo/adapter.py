"""The adapter directory: what a run leaves behind, and the one argument of everything that comes
after it.

The directory remembers its base model, so that evaluate, merge, export, push, chat and resume need
nothing else.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_grpo.atomic import STAGED, read_json

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG, TRAIN_CONFIG = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "train_config.json",
)


def check_adapter(directory: Path) -> Path:
    """Return the directory if it holds an adapter.

    Raises:
        FileNotFoundError: it does not; the message says what is missing and what to point at
        instead.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"adapter directory {directory} does not exist: give one that train_lora.py wrote"
        )
    missing = [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
    if missing:
        inside = sorted(path.parent.name for path in directory.glob(f"*/{WEIGHTS}"))
        hint = (
            f"point at {directory / inside[0]} instead"
            if inside
            else "give one that train_lora.py wrote"
        )
        raise FileNotFoundError(
            f"{directory} is not an adapter directory, it has no {' and no '.join(missing)}: {hint}"
        )
    return directory


def read_train_config(directory: Path) -> dict[str, Any]:
    """Return what `train_config.json` says, or nothing where a plain PEFT directory has none."""
    path = directory / TRAIN_CONFIG
    return read_json(path) if path.is_file() else {}


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of a model folder's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def save_adapter(model: "PeftModel", directory: Path, step: int | None = None) -> None:
    """Write PEFT's two files into the directory, each one whole, over those of an earlier step of
    the same run.

    The step stands in the weights file itself, so that it cannot be taken for another's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f"{STAGED}adapter.") as staged:
        # No embedding is adapted; PEFT would ask the Hub about that at every call.
        model.save_pretrained(staged, save_embedding_layers=False)
        if step is not None:
            write_step(Path(staged) / WEIGHTS, step)
        for name in (CONFIG, WEIGHTS):
            (Path(staged) / name).chmod(0o644)
            os.replace(Path(staged) / name, directory / name)


def write_step(weights: Path, step: int) -> None:
    """Write a safetensors file anew with its training step in its metadata.

    By hand, because safetensors' own writer puts two entries in an order that differs from one
    process to the next, and the same adapter is to be the same file.
    """
    named = weights.with_suffix(".named")
    with weights.open("rb") as source, named.open("wb") as target:
        header = read_header(source) | {"__metadata__": {"format": "pt", "step": str(step)}}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target)
    named.replace(weights)


def read_step(weights: Path) -> int | None:
    """Return the training step that a safetensors file names, or None where it names none."""
    with weights.open("rb") as file:
        step = read_header(file).get("__metadata__", {}).get("step")
    return None if step is None else int(step)


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Return the header of a safetensors file; what follows in the file are the tensors."""
    return json.loads(file.read(int.from_bytes(file.read(8), "little")))
