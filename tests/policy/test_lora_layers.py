"""Adapted layers in fewer passes: PEFT's numbers, less kept for the backward pass."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from lora_grpo.config.train_config import LINEAR_LAYERS
from lora_grpo.policy.base import EMBEDDED_FOLDER, Placement, load_base
from lora_grpo.policy.layers import find_adapted, fused, one_matrix

IDS = torch.arange(3, 43).view(2, 20)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def base_model(kind: str) -> PreTrainedModel:
    """The embedded model (Llama without biases) in 4-bit or whole, or a small model by name."""
    torch.manual_seed(0)
    configs = {"qwen2": Qwen2Config, "llama": LlamaConfig}
    if kind in configs:
        return AutoModelForCausalLM.from_config(configs[kind](**SIZES))
    return load_base(EMBEDDED_FOLDER, Placement("cpu", "float32"), kind == "4-bit", False)


def adapt(kind: str, **knobs: object) -> PeftModel:
    """A model whose adapter is not the identity."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(LINEAR_LAYERS), **knobs}
    model = get_peft_model(base_model(kind), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
        elif name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape)
    return model


def gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return the logits, the gradients of a made-up loss, and the bytes kept between."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(IDS).logits
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (logits * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found, sum(kept.values())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["whole", "4-bit", "qwen2", "llama"])
def test_fused_layers_give_pefts_output_and_gradients_and_keep_less(
    kind: str, checkpointing: bool
) -> None:
    model = adapt(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    logits, expected, kept = gradients(model)
    with fused(model):
        fewer_logits, found, fewer = gradients(model)
    torch.testing.assert_close(fewer_logits, logits, rtol=1e-4, atol=5e-5)
    assert_close(found, expected)
    # Of a block's activations the two that silu(gate) * up keeps besides gate and up are left out.
    assert fewer < (0.85 * kept if not checkpointing else kept + 1)
    again, _, _ = gradients(model)
    assert torch.equal(again, logits)


def test_an_adapter_on_some_layers_alone_and_rslora() -> None:
    for target in (["q_proj", "down_proj"], ["gate_proj"]):
        model = adapt("qwen2", target_modules=target, use_rslora=True).train()
        _, expected, _ = gradients(model)
        with fused(model):
            _, found, _ = gradients(model)
        assert_close(found, expected)


@pytest.mark.parametrize("knobs", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_what_is_more_than_plain_lora_is_left_to_peft(knobs: dict) -> None:
    model = adapt("llama", **knobs).train()
    assert not find_adapted(model)
    model.eval()
    assert bool(find_adapted(model)) == ("lora_dropout" in knobs), "no dropout in evaluation"
    logits = model(IDS).logits
    with one_matrix(model):
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_types_other_than_float32_are_left_to_peft() -> None:
    assert not find_adapted(adapt("llama").to(torch.bfloat16))
    model = adapt("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert not any(found.layer.active_adapters != ["default"] for found in find_adapted(model))


@pytest.mark.parametrize("without_adapter", [False, True])
@pytest.mark.parametrize("kind", ["whole", "4-bit", "qwen2"])
def test_one_matrix_answers_as_base_and_adapter_and_leaves_nothing_behind(
    kind: str, without_adapter: bool
) -> None:
    model = adapt(kind).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), model.disable_adapter() if without_adapter else nullcontext():
        slow = model(IDS).logits
        with one_matrix(model):
            fast = model(IDS).logits
            replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
        again = model(IDS).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert bool(replaced) == (not without_adapter or kind == "4-bit")
    assert torch.equal(again, slow)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
