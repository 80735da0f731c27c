"""Real models and real data, too large or not ours to commit."""

import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared"
SMOLLM2 = Path.home() / ".cache" / "real-models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, built in a minute where it can be."""
    if not (SMOLLM2 / "config.json").is_file():
        tool = SHARED / "tools" / "real_models.py"
        if not tool.is_file():
            pytest.skip("no SmolLM2-135M, and no ../shared/tools/real_models.py to build it")
        done = subprocess.run([sys.executable, tool, "smollm2"], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"SmolLM2-135M could not be built: {done.stderr.strip()[-200:]}")
    return SMOLLM2


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The folder of the real GSM8K's train.jsonl and test.jsonl."""
    if not (SHARED / "gsm8k" / "train.jsonl").is_file():
        pytest.skip("no GSM8K: it is read from ../shared/gsm8k")
    return SHARED / "gsm8k"
