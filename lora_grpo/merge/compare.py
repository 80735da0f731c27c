"""Every tensor of a merged folder, read back and compared with base + delta, one at a time.

The writer is not asked: PEFT computes the deltas, on a model that has no weights but the adapter's.
Memory stays near that of the largest tensor.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.merge.inputs import MergePlan
from lora_grpo.merge.tensors import BLOCK_ELEMENTS, read_header, read_tensor
from lora_grpo.merge.write import load_weight
from lora_grpo.proof.checks import Check

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Adding in another order moves a float32 sum by a few units in its last place.
DELTA_SLACK, SUM_SLACK = 2.0**-18, 2.0**-23


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

    folder = str(plan.record.folder)
    config = LoraConfig.from_pretrained(folder)
    config.init_lora_weights = False
    config.base_model_name_or_path = None  # PEFT warns where it is not the folder's path
    model = get_peft_model(load_skeleton(plan.base_folder)[0], config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.to_empty(device="cpu")
            layer.lora_B.to_empty(device="cpu")
    weights = load_peft_weights(folder, device="cpu")
    lora = {name: values for name, values in weights.items() if ".lora_" in name}
    set_peft_model_state_dict(model, lora)
    return model.eval()


@torch.no_grad()
def check_tensors(plan: MergePlan, folder: Path, quantized: frozenset[str]) -> tuple[Check, float]:
    """Compare every stored value with base + delta, as the stored type rounds it.

    Returns the check, and how much of the adapter's change is in the merged weights: 1 is all, 0 is
    nothing. A change below half an ulp is rounded away, and then the merged model is the base,
    however exact the merge was.
    """
    model, along, whole = load_deltas(plan), 0.0, 0.0
    files = {path.name for path in folder.glob("*.safetensors")}
    faults = [f"{name} does not belong there" for name in sorted(files - plan.layout.keys())]
    for file_name, slots in plan.layout.items():
        stored = read_header(folder / file_name)
        extra = stored.keys() - {slot.name for slot in slots}
        faults += [f"{name} does not belong there" for name in sorted(extra)]
        for slot in slots:
            found = stored.get(slot.name)
            if found is None:
                faults.append(f"{slot.name} is missing")
                continue
            if (found.dtype, found.shape) != (slot.dtype, slot.shape):
                faults.append(f"{slot.name} is {list(found.shape)} in {found.dtype}")
                continue
            base = load_weight(plan, slot.name, slot.name in quantized)
            delta = torch.zeros(())
            if slot.name in plan.deltas:
                layer = model.get_base_model().get_submodule(plan.deltas[slot.name].module)
                delta = layer.get_delta_weight(model.active_adapter)
            fault, projected, size = compare_values(read_tensor(found), base, delta)
            faults += [f"{slot.name}: {fault}"] if fault else []
            along, whole = along + projected, whole + size
    count = f"{len(plan.tensors)} tensors, {len(plan.deltas)} of them adapted"
    detail = "; ".join(faults[:3]) or f"{count}: all within half an ulp"
    return Check("tensors", not faults, detail), along / whole if whole else 0.0


def compare_values(
    merged: torch.Tensor, base: torch.Tensor, delta: torch.Tensor
) -> tuple[str | None, float, float]:
    """Return what is wrong with a merged tensor, None where nothing is, the scalar product of its
    change and the delta, and the delta's square; no delta is a single 0."""
    if not merged.is_floating_point():
        return (None if merged.equal(base) else "differs"), 0.0, 0.0
    slack = DELTA_SLACK * delta.abs().max()
    wrong = worst = along = whole = 0.0
    for start in range(0, merged.numel(), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        found, before = merged.flatten()[block], base.flatten()[block]
        added = delta.flatten()[block] if delta.ndim else delta
        exact = before.float() + added
        # Rounding keeps the order: what lies between two values is rounded between theirs.
        room = slack + SUM_SLACK * exact.abs()
        low, high = (exact - room).to(merged.dtype), (exact + room).to(merged.dtype)
        errors = (found.float() - exact).abs()[~((low <= found) & (found <= high))]
        if len(errors):
            wrong, worst = wrong + len(errors), max(worst, errors.max().item())
        along += ((found.float() - before.float()).double() * added.double()).sum().item()
        whole += added.double().square().sum().item()
    fault = f"{wrong:.0f} of {merged.numel()} values off by up to {worst:.3g}" if wrong else None
    return fault, along, whole
