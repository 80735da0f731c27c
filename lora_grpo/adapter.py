"""The adapter directory: what a run leaves behind, and the one argument of everything that comes
after it.

The directory remembers its base model, so that evaluate, merge, export, push, chat and resume need
nothing else.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.atomic import read_json

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


def save_adapter(model: "PeftModel", directory: Path) -> None:
    """Write PEFT's two files into the directory, each one whole, over those of an earlier step of
    the same run."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".adapter.") as staged:
        # No embedding is adapted; PEFT would ask the Hub about that at every call.
        model.save_pretrained(staged, save_embedding_layers=False)
        for name in (CONFIG, WEIGHTS):
            (Path(staged) / name).chmod(0o644)
            os.replace(Path(staged) / name, directory / name)
