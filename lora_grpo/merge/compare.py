"""Every tensor of a merged folder, read back and compared with base + delta, one at a time.

The writer is not asked: safetensors reads both files, and PEFT computes the deltas on a model that
has no weights but the adapter's. Memory stays near that of the largest tensor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from lora_grpo.merge.inputs import MergePlan
from lora_grpo.merge.tensors import BLOCK_ELEMENTS, DTYPES, Slot
from lora_grpo.merge.write import dequantize
from lora_grpo.proof.checks import Check

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Adding in another order moves a float32 sum by a few units in its last place.
FLOAT32_SLACK = 2.0**-18


def load_skeleton(folder: Path) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Load a model without its weights; return it and what transformers said about its tensors."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="meta",
        output_loading_info=True,
        trust_remote_code=False,
    )


def load_deltas(plan: MergePlan) -> "PeftModel":
    """Put the adapter on its base without the base's weights, so that PEFT computes the deltas."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(plan.adapter_dir))
    config.init_lora_weights = False
    config.base_model_name_or_path = None  # PEFT warns where it is not the folder's path
    model = get_peft_model(load_skeleton(plan.base_folder)[0], config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.to_empty(device="cpu")
            layer.lora_B.to_empty(device="cpu")
    weights = load_peft_weights(str(plan.adapter_dir), device="cpu")
    lora = {name: values for name, values in weights.items() if ".lora_" in name}
    set_peft_model_state_dict(model, lora)
    return model.eval()


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far rounding to `dtype` moves each float32 value at most: half the spacing."""
    unit = torch.tensor(torch.finfo(dtype).eps / 4).expand_as(values)
    spacing = torch.ldexp(unit, torch.frexp(values).exponent) * (values != 0)
    return spacing.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2)


@dataclass
class Kept:
    """How much of the adapter's change is in the merged weights: 1 is all, 0 is nothing.

    The projection of (merged - base) on the delta, over all tensors. A change below half an ulp is
    rounded away, and then the merged model is the base, however exact the merge was.
    """

    along: float = 0.0
    whole: float = 0.0

    def add(self, change: torch.Tensor, delta: torch.Tensor) -> None:
        self.along += (change.double() * delta.double()).sum().item()
        self.whole += delta.double().square().sum().item()

    @property
    def share(self) -> float:
        return self.along / self.whole if self.whole else 0.0


def check_tensors(plan: MergePlan, folder: Path, quantized: frozenset[str]) -> tuple[Check, float]:
    """Compare every stored value with base + delta, to half an ulp of the stored type.

    Returns the check, and the share of the adapter's change that rounding left (see `Kept`).
    """
    model, kept = load_deltas(plan), Kept()
    files = {path.name for path in folder.glob("*.safetensors")}
    faults = [f"{name} does not belong there" for name in sorted(files - plan.layout.keys())]
    for file_name, slots in plan.layout.items():
        with safe_open(folder / file_name, "pt") as merged:
            found = set(merged.keys())
        expected = {slot.name for slot in slots}
        faults += [f"{name} does not belong there" for name in sorted(found - expected)]
        faults += [f"{name} is missing" for name in sorted(expected - found)]
        for slot in (slot for slot in slots if slot.name in found):
            faults += compare_tensor(
                plan, slot, folder / file_name, model, slot.name in quantized, kept
            )
    count = f"{len(plan.tensors)} tensors, {len(plan.deltas)} of them adapted"
    detail = "; ".join(faults[:3]) or f"{count}: all within half an ulp"
    return Check("tensors", not faults, detail), kept.share


@torch.no_grad()
def compare_tensor(
    plan: MergePlan, slot: Slot, path: Path, model: "PeftModel", is_quantized: bool, kept: Kept
) -> list[str]:
    """Return what is wrong with one stored tensor, nothing where it is right."""
    stored = plan.tensors[slot.name]
    # Opened for one tensor only: the pages of a memory map count as the process's memory.
    with safe_open(path, "pt") as after, safe_open(stored.path, "pt") as before:
        merged, weight = after.get_tensor(slot.name), before.get_tensor(slot.name)
    if merged.shape != weight.shape or merged.dtype != DTYPES[slot.dtype]:
        return [f"{slot.name} is {list(merged.shape)} in {merged.dtype}"]
    if not slot.is_float:
        return [] if merged.equal(weight) else [f"{slot.name} differs"]
    if is_quantized:
        weight = dequantize(weight, plan.four_bit)
    delta = torch.zeros(())
    if slot.name in plan.deltas:
        layer = model.get_base_model().get_submodule(plan.deltas[slot.name].module)
        delta = layer.get_delta_weight(model.active_adapter).flatten()
    slack, count, worst = FLOAT32_SLACK * delta.abs().max().item(), 0, 0.0
    for start in range(0, merged.numel(), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        found, base = (tensor.flatten()[block].float() for tensor in (merged, weight))
        added = delta[block] if delta.ndim else delta
        expected = base + added
        error = (found - expected).abs()
        wrong = error[~(error <= half_ulp(expected, merged.dtype) + slack)]
        count, worst = count + len(wrong), max([worst, *wrong.sort().values[-1:].tolist()])
        if delta.ndim:
            kept.add(found - base, added)
    if not count:
        return []
    return [f"{slot.name}: {count} of {merged.numel()} values off by up to {worst:.3g}"]
