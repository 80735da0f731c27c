"""The base model as loaded: 4-bit weights stay as they are stored, on any processor."""

import inspect
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, modules

from lora_grpo.export.gguf.llamacpp import LlamaCpp
from lora_grpo.policy.base import Placement, load_base
from lora_grpo.policy.open import TransformersPolicy, VLLMPolicy

IDS = torch.tensor([[5, 9, 17, 3]])


def test_generating_does_not_repack_4bit_weights(tiny_model_folder: Path, monkeypatch) -> None:
    """On a processor with AVX512-BF16 bitsandbytes would, and the model could not be trained on."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = load_base(tiny_model_folder, Placement("cpu", "float32"), load_in_4bit=True).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        logits = model(IDS).logits
    assert len(layers) == 28
    assert all(torch.equal(a, layer.weight.data) for a, layer in zip(before, layers, strict=True))
    monkeypatch.undo()
    other = load_base(tiny_model_folder, Placement("cpu", "float32"), load_in_4bit=True).train()
    assert torch.equal(other(IDS).logits.detach(), logits)


def test_every_policy_is_asked_alike() -> None:
    """`evaluate_model` asks each of them, two of which are run only where their engines are."""
    asked = [
        list(inspect.signature(policy.complete).parameters)
        for policy in (TransformersPolicy, VLLMPolicy, LlamaCpp)
    ]
    assert asked[0] == asked[1] == asked[2]
