"""What a merged model is held against: base + adapter in float32, by PEFT's own arithmetic.

A plan goes in; the loaded policy, its weights one by one, and the same policy with its weights
rounded come out.
"""

from typing import TYPE_CHECKING

import torch

from lora_grpo.merge_inputs import MergePlan
from lora_grpo.merge_weights import load_weight
from lora_grpo.model import load_adapter
from lora_grpo.safetensors_stream import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from peft import PeftModel

# Adding in another order moves a float32 sum by a few units in its last place.
FLOAT32_SLACK = 2.0**-18


def load_policy(plan: MergePlan, quantized: frozenset[str]) -> "PeftModel":
    """Load the base that was merged into, in float32, and put the adapter on it with PEFT."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        plan.base_folder, dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        for name in quantized:
            base.get_parameter(name).copy_(load_weight(plan.tensors[name], plan.four_bit))
    return load_adapter(base, plan.adapter_dir).eval()


def policy_weight(
    model: "PeftModel", plan: MergePlan, name: str
) -> tuple[torch.Tensor, float] | None:
    """Return a weight of base + adapter in float32, and how far off another order of adding may be.

    None for a tensor that is no parameter of the loaded model, such as a tied one's second name.
    """
    base = model.get_base_model()
    if name in plan.deltas:
        layer = base.get_submodule(plan.deltas[name].module)
        delta = layer.get_delta_weight(model.active_adapter)
        return layer.base_layer.weight + delta, FLOAT32_SLACK * delta.abs().max().item()
    try:
        return base.get_parameter(name), 0.0
    except AttributeError:
        return None


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far rounding to `dtype` moves each float32 value at most: half the spacing."""
    unit = torch.tensor(torch.finfo(dtype).eps / 4).expand_as(values)
    spacing = torch.ldexp(unit, torch.frexp(values).exponent) * (values != 0)
    return spacing.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2)


@torch.no_grad()
def round_weights(model: "PeftModel", plan: MergePlan) -> None:
    """Move the policy's weights, adapter included, to what the merged type holds of them, for good.

    The loss is no random noise: of changes below half an ulp nothing is left, and those of a
    trained adapter point one way.
    """
    dtype = getattr(torch, plan.dtype)
    for name in (slot.name for slots in plan.layout.values() for slot in slots if slot.is_float):
        found = policy_weight(model, plan, name)
        if found is None:
            continue
        stored = stored_weight(model, plan, name).view(-1)
        blocks = (tensor.flatten().split(BLOCK_ELEMENTS) for tensor in (found[0], stored))
        for weight, target in zip(*blocks, strict=True):
            target.add_(weight.to(dtype).float() - weight)


def stored_weight(model: "PeftModel", plan: MergePlan, name: str) -> torch.nn.Parameter:
    base = model.get_base_model()
    if name in plan.deltas:
        return base.get_submodule(plan.deltas[name].module).base_layer.weight
    module, _, leaf = name.rpartition(".")
    return getattr(base.get_submodule(module), leaf)
