import os
from pathlib import Path

import pytest

# One thread a process: tests run side by side, and threads that wait for each other spin.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model; where it has not been built, one of its shape with random weights."""
    from lora_grpo.policy.base import EMBEDDED_FOLDER

    if (EMBEDDED_FOLDER / "model.safetensors").is_file():
        return EMBEDDED_FOLDER
    from lora_grpo.dev.tiny_model import PretrainConfig, build_model, train_tokenizer

    folder = tmp_path_factory.mktemp("untrained")
    tokenizer = train_tokenizer(0)
    tokenizer.save_pretrained(folder)
    build_model(PretrainConfig(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder: Path):
    """A real tokenizer of a few hundred tokens, with its chat template."""
    from lora_grpo.policy.base import load_tokenizer

    return load_tokenizer(tiny_model_folder)
