"""vLLM's CPU build is the real engine; `make test-vllm` installs it into its own environment."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

import pytest

from lora_grpo.machine.backend import Choice, claim, installed

ROOT = Path(__file__).parents[2]

if not installed("vllm"):
    collect_ignore_glob = ["test_*.py"]
else:
    claim(Choice("transformers", "vllm", "", ""))


@pytest.fixture(autouse=True)
def no_engine_left() -> Iterator[None]:
    """No test leaves a temporary folder behind."""
    from lora_grpo.policy.vllm import PREFIX

    before = set(Path(gettempdir()).glob(f"{PREFIX}*"))
    yield
    assert set(Path(gettempdir()).glob(f"{PREFIX}*")) <= before
