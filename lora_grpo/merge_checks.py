"""What can be checked of a merged folder by looking: every tensor, tokenizer, EOS, ties and config.

Each check returns its name, whether it passed and what it found. The tensors are compared with what
PEFT makes of base and adapter, not with this project's own formula.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_grpo.adapter import read_json
from lora_grpo.logit_distance import Distance
from lora_grpo.merge_folder import build_config
from lora_grpo.merge_inputs import MergePlan
from lora_grpo.merge_reference import half_ulp, policy_weight
from lora_grpo.merge_weights import dequantize
from lora_grpo.model import read_tokenizer
from lora_grpo.safetensors_stream import BLOCK_ELEMENTS, read_tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How much further than random noise within a type's bound an export may take a model.
LOGIT_FACTOR, KL_FACTOR = 3, 4
# A merge rounds the same values as its reference: the two differ only where the order of a sum tips
# a rounding. Over 40 merges of trained adapters (Gemma 2, Gemma 3, Llama, Qwen3) they were equal.
ROUNDING_FACTOR = 1.5
PROBE_TEXT = "12 + 34 = 46,  1,200 is $1200.00\n\n\tf(x)  # naïve 数学 😀 <answer>7</answer>"


@dataclass(frozen=True)
class Check:
    """The outcome of one check, with a sentence for people."""

    name: str
    passed: bool
    detail: str


def check_tensors(plan: MergePlan, folder: Path, model: "PeftModel") -> Check:
    """Read every tensor back and compare its values with base + adapter, to half an ulp."""
    files = {path.name for path in folder.glob("*.safetensors")}
    faults = [f"{name} does not belong there" for name in sorted(files - plan.layout.keys())]
    for file_name, slots in plan.layout.items():
        with safe_open(folder / file_name, "pt") as merged, torch.no_grad():
            expected = {slot.name for slot in slots}
            faults += [f"{name} does not belong there" for name in set(merged.keys()) - expected]
            faults += [f"{name} is missing" for name in expected - set(merged.keys())]
            for name in expected & set(merged.keys()):
                faults += compare_tensor(plan, name, merged.get_tensor(name), model)
    count = f"{len(plan.tensors)} tensors, {len(plan.deltas)} of them adapted"
    return Check("tensors", not faults, "; ".join(faults[:3]) or f"{count}: all within half an ulp")


def compare_tensor(
    plan: MergePlan, name: str, merged: torch.Tensor, model: "PeftModel"
) -> list[str]:
    policy = policy_weight(model, plan, name)
    if policy is None:
        return (
            []
            if merged.equal(read_tensor(plan.tensors[name]).to(merged.dtype))
            else [f"{name} differs"]
        )
    weight, slack = policy
    if merged.shape != weight.shape or merged.dtype != getattr(torch, plan.dtype):
        return [f"{name} is {list(merged.shape)} in {merged.dtype}"]
    count, worst = 0, 0.0
    blocks = (tensor.flatten().split(BLOCK_ELEMENTS) for tensor in (merged, weight))
    for found, expected in zip(*blocks, strict=True):
        error = (found.float() - expected).abs()
        wrong = error[~(error <= half_ulp(expected, merged.dtype) + slack)]
        count, worst = count + len(wrong), max([worst, *wrong.sort().values[-1:].tolist()])
    return [f"{name}: {count} of {merged.numel()} values off by up to {worst:.3g}"] if count else []


def check_tokenizer(folder: Path, expected: "PreTrainedTokenizerBase", texts: list[str]) -> Check:
    """Tokenize prompts and a probe with the merged folder's tokenizer and with the adapter's."""
    found = read_tokenizer(folder)
    faults = [
        f"{name} differs"
        for name in ("chat_template", "eos_token_id", "pad_token_id", "bos_token_id")
        if getattr(found, name) != getattr(expected, name)
    ]
    if found.get_vocab() != expected.get_vocab():
        faults.append("the vocabulary differs")
    probes = [*texts, PROBE_TEXT]
    different = sum(found(text)["input_ids"] != expected(text)["input_ids"] for text in probes)
    if different:
        faults.append(f"{different} of {len(probes)} texts get other ids")
    return Check(
        "tokenizer", not faults, "; ".join(faults) or f"{len(probes)} texts get the same ids"
    )


def check_generation_config(folder: Path) -> Check:
    """Load and validate the generation config as saving the model again would."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(folder).validate(strict=True)
    except (ValueError, OSError) as error:
        return Check("generation_config", False, " ".join(str(error).split()))
    return Check("generation_config", True, "valid")


def check_eos(found: int | list[int] | None, expected: list[int]) -> Check:
    """Compare what the merged model stops on with the tokenizer's EOS and the base's own."""
    return Check("eos", found == expected, f"stops on {found}, expected {expected}")


def shares_embeddings(model: "PreTrainedModel") -> bool:
    """Return whether a loaded model's output layer is its embedding table."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def check_ties(found: bool, expected: bool) -> Check:
    """Compare whether the embeddings are tied once loaded, in the merged model and its base."""
    words = {True: "tied", False: "not tied"}
    detail = f"{words[found]}, in the base {words[expected]}"
    return Check("tied_embeddings", found == expected, detail)


def check_config(plan: MergePlan, folder: Path) -> Check:
    """Compare the config with the base's: the type alone may differ."""
    found, expected = read_json(folder / "config.json"), build_config(plan)
    keys = sorted(
        key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
    )
    return Check(
        "config",
        not keys,
        f"differs in {', '.join(keys)}" if keys else f"the base's, in {plan.dtype}",
    )


def check_reload(loading: dict[str, set]) -> Check:
    """Read what transformers said while it loaded the merged folder."""
    faults = [
        f"{kind}: {', '.join(sorted(map(str, found))[:3])}"
        for kind, found in loading.items()
        if found
    ]
    return Check("reload", not faults, "; ".join(faults) or "every weight found its place")


def check_dequantized(
    plan: MergePlan, quantized: frozenset[str], policy: "PreTrainedModel"
) -> Check:
    """Compare the weights that were merged into with those of the model as 4-bit loading has it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = {
        f"{name}.weight": m for name, m in policy.named_modules() if isinstance(m, Linear4bit)
    }
    faults = [f"{name} is quantised in one of the two only" for name in layers.keys() ^ quantized]
    for name in layers.keys() & quantized:
        weight = layers[name].weight
        loaded = dequantize_4bit(weight.data, weight.quant_state).float().cpu()
        if not loaded.equal(dequantize(read_tensor(plan.tensors[name]), plan.four_bit)):
            faults.append(f"{name} differs")
    detail = (
        "; ".join(faults[:3]) or f"{len(layers)} weights equal the 4-bit model's to the last bit"
    )
    return Check("dequantized_base", not faults, detail)


def check_distance(
    merged: Distance,
    noise: Distance,
    logit_factor: float = LOGIT_FACTOR,
    kl_factor: float = KL_FACTOR,
) -> list[Check]:
    """Compare a model's distance from its reference with that of noise of the expected size.

    A greedy choice may flip only where the reference's lead was within the logit bound.
    """
    bound, kl_bound = logit_factor * noise.max_logit_difference, kl_factor * noise.mean_kl
    difference, kl, margin = (
        merged.max_logit_difference,
        merged.mean_kl,
        merged.largest_flipped_margin,
    )
    share = f"{merged.greedy_agreement:.2%} of {merged.positions} choices agree"
    return [
        Check(
            "logits", difference <= bound, f"differ by up to {difference:.3g}, allowed {bound:.3g}"
        ),
        Check("kl", kl <= kl_bound, f"{kl:.3g} nats a token, allowed {kl_bound:.3g}"),
        Check(
            "greedy",
            margin <= bound,
            f"{share}, largest lead lost {margin:.3g}, allowed {bound:.3g}",
        ),
    ]
