"""The proof of a merge: reload the folder and compare it with base + adapter, both in float32.

Rounding to 16 bits moves a weight by up to half an ulp, so no merge equals its policy. What that
does to the logits is measured, not guessed: the policy's own weights are rounded, as PEFT computes
them, and the merged model may be little further from the policy than that takes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_grpo.machine.files import read_json
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.inputs import MergePlan
from lora_grpo.merge.tensors import BLOCK_ELEMENTS, read_tensor
from lora_grpo.merge.write import build_config, dequantize, find_quantized, load_weight
from lora_grpo.policy.base import (
    choose_placement,
    load_adapter,
    load_base,
    merge_end_ids,
    read_tokenizer,
)
from lora_grpo.proof.checks import (
    Check,
    check_distance,
    check_eos,
    check_generation_config,
    check_reload,
    check_ties,
    check_tokenizer,
    shares_embeddings,
)
from lora_grpo.proof.distance import Distance, collect_logits, continue_greedily, measure_distance
from lora_grpo.proof.reference import (
    MAX_NEW_TOKENS,
    Reference,
    quiet_transformers,
    render_prompts,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


# A merge rounds the same values as its reference: the two differ only where the order of a sum tips
# a rounding. Over 40 merges of trained adapters (Gemma 2, Gemma 3, Llama, Qwen3) they were equal.
ROUNDING_FACTOR = 1.5


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


@dataclass(frozen=True)
class Proof:
    """The checks, and the distances that they rest on.

    From base + adapter: the merged model (None if it cannot be loaded), rounding noise, the bare
    base. Where the policy was trained in 4-bit, also the merged model from that policy; this has no
    bound. `reference` is what was seen of the merged model, for exports to be compared with.
    """

    checks: tuple[Check, ...]
    merged: Distance | None
    rounding_noise: Distance
    bare_base: Distance
    from_4bit_policy: Distance | None
    reference: Reference | None = None

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True)
class Policy:
    """What is kept of base + adapter once its weights are freed."""

    sequences: list[list[int]]
    logits: list[torch.Tensor]
    bare_base: Distance
    rounding_noise: Distance
    end_ids: list[int]
    tied: bool
    tensors: Check


def prove_merge(
    plan: MergePlan, folder: Path, num_prompts: int, report: Callable[[str], None]
) -> Proof:
    """Check a merged folder against its plan, with one model in memory at a time."""
    tokenizer = read_tokenizer(plan.tokenizer_folder)
    prompts = render_prompts(plan.adapter_dir, plan.style, tokenizer, num_prompts)
    quantized = find_quantized(plan)
    with quiet_transformers():
        report("proving: base + adapter in float32")
        policy = observe_policy(plan, folder, tokenizer, prompts, quantized)
        report("proving: the merged folder, reloaded")
        logits, checks = observe_merged(folder, policy)
        merged = drift = reference = None
        if logits is not None:
            merged = measure_distance(policy.logits, logits)
            ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            reference = Reference(prompts, ids, policy.sequences, logits)
            factors = (ROUNDING_FACTOR, ROUNDING_FACTOR)
            checks += check_distance(merged, policy.rounding_noise, *factors)
        if logits is not None and plan.four_bit is not None:
            report("measuring the drift from the 4-bit policy")
            drift, found = observe_drift(plan, policy.sequences, logits, quantized)
            checks += found
    checks += [
        policy.tensors,
        check_config(plan, folder),
        check_generation_config(folder),
        check_tokenizer(folder, tokenizer, prompts),
    ]
    return Proof(tuple(checks), merged, policy.rounding_noise, policy.bare_base, drift, reference)


def observe_policy(
    plan: MergePlan,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    quantized: frozenset[str],
) -> Policy:
    """Load base + adapter in float32 and take from it what the merged model is held against."""
    model = load_policy(plan, quantized)
    base = model.get_base_model()
    sequences = continue_greedily(model, tokenizer, prompts, MAX_NEW_TOKENS)
    logits = list(collect_logits(model, sequences))
    with model.disable_adapter():
        bare_base = measure_distance(logits, collect_logits(model, sequences))
    tensors = check_tensors(plan, folder, model)
    round_weights(model, plan)
    return Policy(
        sequences=sequences,
        logits=logits,
        bare_base=bare_base,
        rounding_noise=measure_distance(logits, collect_logits(model, sequences)),
        end_ids=merge_end_ids(tokenizer, base.generation_config.eos_token_id),
        tied=shares_embeddings(base),
        tensors=tensors,
    )


def observe_merged(folder: Path, policy: Policy) -> tuple[list[torch.Tensor] | None, list[Check]]:
    """Load the merged folder as any user would, and run it on the policy's sequences."""
    from transformers import AutoModelForCausalLM

    release_memory()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        logits = list(collect_logits(model, policy.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return None, [Check("reload", False, f"{type(error).__name__}: {error}")]
    return logits, [
        check_reload(loading),
        check_ties(shares_embeddings(model), policy.tied),
        check_eos(model.generation_config.eos_token_id, policy.end_ids),
    ]


def observe_drift(
    plan: MergePlan,
    sequences: list[list[int]],
    logits: list[torch.Tensor],
    quantized: frozenset[str],
) -> tuple[Distance, list[Check]]:
    """Measure the merged model's distance from the policy as it was trained, on its 4-bit base."""
    release_memory()
    placement = choose_placement(plan.four_bit.dtype)
    base = load_base(plan.base_folder, placement, True, plan.four_bit.double_quant)
    checks = [check_dequantized(plan, quantized, base)] if plan.base == "dequantized" else []
    model = load_adapter(base, plan.adapter_dir).eval()
    return measure_distance(collect_logits(model, sequences), logits), checks
