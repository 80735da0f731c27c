"""A model goes into GGUF, transformers reads it, and it is the same model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf_models import CONFIGS, LLAMA3_ROPE, make_model
from merge_models import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.export.gguf.tokenizer import describe_tokenizer
from lora_grpo.export.gguf.write import read_model, rope_factors, write_model

IDS = torch.tensor([[5, 9, 200, 17, 3, 44, 101, 7, 7, 250]])


def write(kind: str, path: Path) -> None:
    vocabulary = describe_tokenizer(make_tokenizer(), 512, [2])
    write_model(path, read_model(make_model(kind)), vocabulary, "bf16", "m")


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama3 rope"])
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path / "m.gguf")
    folder = make_model(kind)
    # Its reader knows no head size of Qwen3 but 128, so for that one it gets the config.
    known = {"config": AutoConfig.from_pretrained(folder)} if kind == "qwen3" else {}
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **known
    )
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, merged(IDS).logits)
    tied = read.lm_head.weight is read.model.embed_tokens.weight
    assert tied == (kind != "llama untied")


def test_llama3_frequencies_follow_the_published_rule() -> None:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    config = CONFIGS["llama3 rope"]()
    found = rope_factors(config)
    expected = []
    for index in range(0, 16, 2):
        wave = 2 * math.pi * LLAMA3_ROPE["rope_theta"] ** (index / 16)
        blend = (64 / wave - 1.0) / (4.0 - 1.0)
        blend = min(max(blend, 0.0), 1.0)
        expected.append(1 / ((1 - blend) / 8.0 + blend))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_file_holds_the_frequencies(tmp_path: Path) -> None:
    write("llama3 rope", tmp_path / "m.gguf")
    names = [tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors]
    assert "rope_freqs.weight" in names and len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "knows llama, qwen2"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding windows"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope types default, llama3",
        ),
    ],
)
def test_what_is_not_written_is_refused(changes: dict, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("qwen2"), folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **changes}))
    with pytest.raises(ValueError, match=sentence):
        read_model(folder)
