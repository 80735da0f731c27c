"""Replacements for a model's layers during a block: linear layers with an adapter in fewer passes
over memory than PEFT's general code needs, and another attention.

In an update (`fused`) a layer adds the adapter's output to the base's product in place and saves
only its input; a gated MLP saves gate and up, and multiplies them again in the backward pass. While
a CPU model generates (`one_matrix`) a layer is the single matrix W + scale B A.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapted:
    """A PEFT layer whose output is exactly W x + scale B A x (+ bias)."""

    layer: torch.nn.Module
    base: torch.nn.Module
    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scale: float


def is_4bit(layer: torch.nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit

    return isinstance(layer, Linear4bit)


def read_weight(base: torch.nn.Module) -> torch.Tensor:
    """Return a layer's weight (out, in), dequantised if it is in 4-bit."""
    if not is_4bit(base):
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state)


def find_adapted(model: "PeftModel | PreTrainedModel") -> list[Adapted]:
    """Return the layers that can be replaced: plain LoRA, all of it in float32."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    found = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
            continue
        base, names = layer.get_base_layer(), layer.active_adapters
        if not (isinstance(layer, Linear) or is_4bit(base)) or len(names) != 1:
            continue
        name = names[0]
        if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
            continue
        dropout = layer.lora_dropout[name]
        dtype = base.weight.quant_state.dtype if is_4bit(base) else base.weight.dtype
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        plain = type(base) is torch.nn.Linear or is_4bit(base)
        random = layer.training and getattr(dropout, "p", 0.0) > 0
        if plain and not random and {dtype, a.dtype, b.dtype} == {torch.float32}:
            found.append(Adapted(layer, base, a, b, layer.scaling[name]))
    return found


def forward_product(x: torch.Tensor, layer: Adapted) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer's output (N, out) for x (N, in), and A x (N, r)."""
    low = x @ layer.a.T
    return linear(x, read_weight(layer.base), layer.base.bias).addmm_(
        low, layer.b.T, alpha=layer.scale
    ), low


def backward_product(
    gradient: torch.Tensor, x: torch.Tensor, low: torch.Tensor, layer: Adapted, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients with respect to x (if `wanted`), A and B."""
    by_low = (gradient @ layer.b).mul_(layer.scale)
    by_x = (gradient @ read_weight(layer.base)).addmm_(by_low, layer.a) if wanted else None
    return by_x, by_low.T @ x, (gradient.T @ low).mul_(layer.scale)


class Product(torch.autograd.Function):
    """`(x (..., in), A, B, layer)` to the layer's output (..., out)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: Adapted,
    ) -> torch.Tensor:
        output, low = forward_product(x.flatten(0, -2), layer)
        ctx.save_for_backward(x, low)
        ctx.layer = layer
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None]:
        x, low = ctx.saved_tensors
        flat, wanted = gradient.flatten(0, -2), ctx.needs_input_grad[0]
        by_x, by_a, by_b = backward_product(flat, x.flatten(0, -2), low, ctx.layer, wanted)
        return None if by_x is None else by_x.view(x.shape), by_a, by_b, None


class GatedProduct(torch.autograd.Function):
    """`(gate (..., in), up (..., in), A, B, layer)` to the layer's output of silu(gate) * up."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        gate: torch.Tensor,
        up: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: Adapted,
    ) -> torch.Tensor:
        output, low = forward_product(silu(gate).mul_(up).flatten(0, -2), layer)
        ctx.save_for_backward(gate, up, low)
        ctx.layer = layer
        return output.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, None]:
        gate, up, low = ctx.saved_tensors
        opened = silu(gate)
        hidden = (opened * up).flatten(0, -2)
        by_hidden, by_a, by_b = backward_product(
            gradient.flatten(0, -2), hidden, low, ctx.layer, wanted=True
        )
        del hidden
        by_hidden = by_hidden.view(gate.shape)
        by_up = opened.mul_(by_hidden)
        by_gate = torch.ops.aten.silu_backward(by_hidden.mul_(up), gate)
        return by_gate, by_up, by_a, by_b, None


def is_gated(module: torch.nn.Module) -> bool:
    """Return whether a module looks like an MLP that computes down(silu(gate(x)) * up(x)); the
    start-up self-test (`grpo.self_test`) shows whether it does."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return [name for name, _ in module.named_children()] == list(names) and (
        "silu" in type(module.act_fn).__name__.lower()
    )


def fused_forward(layer: Adapted, x: torch.Tensor) -> torch.Tensor:
    return Product.apply(x, layer.a, layer.b, layer)


def gated_forward(mlp: torch.nn.Module, down: Adapted, x: torch.Tensor) -> torch.Tensor:
    return GatedProduct.apply(mlp.gate_proj(x), mlp.up_proj(x), down.a, down.b, down)


@contextmanager
def fused(model: "PeftModel | PreTrainedModel") -> Iterator[None]:
    """Compute the adapted layers so that little is saved for the backward pass.

    Keep it active during the backward pass too: gradient checkpointing runs the layers again.
    """
    layers = {found.layer: found for found in find_adapted(model)}
    forwards = {layer: partial(fused_forward, found) for layer, found in layers.items()}
    for mlp in filter(is_gated, model.modules()):
        if mlp.down_proj in layers:
            forwards[mlp] = partial(gated_forward, mlp, layers[mlp.down_proj])
    with replaced(forwards):
        yield


@contextmanager
def one_matrix(model: "PeftModel | PreTrainedModel") -> Iterator[None]:
    """Make each adapted or 4-bit layer of a CPU model a single matrix while it generates.

    Without this a CPU dequantises every weight and computes every adapter for every token. The
    outputs are those of base + adapter up to float32 rounding. It costs one more copy of these
    layers while the block runs. Does nothing on a GPU, whose kernels read 4-bit weights directly.
    """
    forwards = {}
    if next(model.parameters()).device.type == "cpu":
        with torch.no_grad():
            layers = find_adapted(model)
            for found in layers:
                weight = torch.addmm(read_weight(found.base), found.b, found.a, alpha=found.scale)
                forwards[found.layer] = partial(linear, weight=weight, bias=found.base.bias)
            done = {found.base for found in layers}
            for layer in filter(is_4bit, model.modules()):
                if layer not in done:
                    weight = read_weight(layer)
                    forwards[layer] = partial(linear, weight=weight, bias=layer.bias)
    with replaced(forwards):
        yield


@contextmanager
def replaced(forwards: dict[torch.nn.Module, partial]) -> Iterator[None]:
    """Replace these modules' forward functions while the block runs."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def attention_replaced(
    model: "PreTrainedModel", name: str, attention: Callable[..., tuple[torch.Tensor, None]]
) -> Iterator[None]:
    """Register a function with transformers' attention interface as `name`, and let the model use
    it while the block runs."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    config = model.config.get_text_config()
    own, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = own
