"""Random models of each family in llama.cpp: its logits are those of transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf_models import CONFIGS, make_model
from merge_models import make_tokenizer
from transformers import AutoModelForCausalLM

from lora_grpo.export.gguf.llamacpp import LlamaCpp
from lora_grpo.export.gguf.tokenizer import describe_tokenizer
from lora_grpo.export.gguf.write import read_model, write_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed here; make test-llamacpp installs it",
)
# Long enough that Llama 3's slowed frequencies matter: they begin beyond 64 positions here.
IDS = [(7 * index * index + 3) % 480 + 3 for index in range(160)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = read_model(make_model(kind))
    vocabulary = describe_tokenizer(make_tokenizer(), 512, [2])
    write_model(tmp_path / "m.gguf", model, vocabulary, "f16", "m")
    llama = LlamaCpp(tmp_path / "m.gguf", len(IDS) + 1, keep_logits=True)
    found = torch.from_numpy(llama.logits(IDS, len(IDS)))
    llama.close()
    merged = AutoModelForCausalLM.from_pretrained(make_model(kind), dtype=torch.float32)
    with torch.no_grad():
        expected = merged(torch.tensor([IDS])).logits[0]
    error = (found - expected).abs().max() / expected.abs().max()
    print(f"{kind}: logits within {error:.1e} of the largest")
    assert error < 0.01
