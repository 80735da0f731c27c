"""The proof of a merge, in two strengths.

`tensors` compares every stored tensor with base + delta, and what stands around the weights with
the base's, in little memory. `logits` also loads both models in float32 and compares their logits.
Rounding to 16 bits moves a weight by up to half an ulp, so no merge equals its policy. What that
does to the logits is measured, not guessed: the policy's own weights are rounded, as PEFT computes
them, and the merged model may be little further from the policy than that takes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lora_grpo.machine.files import read_json
from lora_grpo.machine.hardware import available_memory
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.compare import check_tensors, load_skeleton
from lora_grpo.merge.inputs import MergePlan
from lora_grpo.merge.write import build_config, find_quantized, load_weight
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

ProofKind = Literal["tensors", "logits"]
# A merge rounds the same values as its reference: the two differ only where the order of a sum tips
# a rounding. Over 40 merges of trained adapters (Gemma 2, Gemma 3, Llama, Qwen3) they were equal.
ROUNDING_FACTOR = 1.5
# Peak memory of the logits proof: the merge's 16-bit bytes three times (float32, and the pages of
# the file while it is read), and what Python, torch and the logits of eight prompts take.
COPIES, FIXED_BYTES = 3, 2 * 10**9
SHARE_OF_FREE = 0.8


def choose_proof(asked: ProofKind | None, nbytes: int) -> tuple[ProofKind, str]:
    """Return which proof to run on a merge of `nbytes`, and why in a few words."""
    if asked is not None:
        return asked, f"--proof {asked}"
    needed, free = COPIES * nbytes + FIXED_BYTES, available_memory()
    figures = f"logits needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return ("logits" if needed <= SHARE_OF_FREE * free else "tensors"), figures


@dataclass(frozen=True)
class Distances:
    """How far models are from base + adapter, both in float32; what the logits proof measures.

    The merged model (None if it cannot be loaded), the policy's own weights rounded, the bare base.
    Where the policy was trained in 4-bit, also the merged model from that policy; this has no
    bound.
    """

    merged: Distance | None
    rounding_noise: Distance
    bare_base: Distance
    from_4bit_policy: Distance | None


@dataclass(frozen=True)
class MergeProof:
    """The checks and figures; `kept` is the share of the adapter's change that rounding left, and
    `reference` what was seen of the merged model, for exports to be compared with."""

    checks: tuple[Check, ...]
    kept: float
    distances: Distances | None
    reference: Reference | None

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def prove_merge(
    plan: MergePlan,
    folder: Path,
    num_prompts: int,
    report: Callable[[str], None],
    kind: ProofKind = "logits",
) -> MergeProof:
    """Check a merged folder against its plan, with at most one model in memory at a time."""
    tokenizer = read_tokenizer(plan.tokenizer_folder)
    prompts = render_prompts(plan.record.records, plan.style, tokenizer, num_prompts)
    quantized = find_quantized(plan)
    with quiet_transformers():
        report("proving: every tensor, read back, against base + delta")
        tensors, kept = check_tensors(plan, folder, quantized)
        checks = (
            tensors,
            check_config(plan, folder),
            check_generation_config(folder),
            check_tokenizer(folder, tokenizer, prompts),
        )
        if plan.base == "dequantized":
            checks += (check_dequantized(plan, quantized),)
        distances = reference = None
        if kind == "tensors":
            _, found = check_structure(plan, tokenizer, lambda: load_skeleton(folder))
        else:
            found, distances, reference = compare_logits(
                plan, folder, tokenizer, prompts, quantized, report
            )
    return MergeProof((*checks, *found), kept, distances, reference)


def check_structure(
    plan: MergePlan,
    tokenizer: "PreTrainedTokenizerBase",
    load: Callable[[], tuple["PreTrainedModel", dict[str, Any]]],
    sequences: Sequence[list[int]] = (),
) -> tuple[list[torch.Tensor] | None, list[Check]]:
    """Load the merged folder as any user would and compare its ties and ends with the base's.

    Returns its logits on the sequences, None where it cannot be loaded or run, and the checks.
    """
    base = load_skeleton(plan.base_folder)[0]
    try:
        model, loading = load()
        logits = list(collect_logits(model, sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return None, [Check("reload", False, f"{type(error).__name__}: {error}")]
    ends = merge_end_ids(tokenizer, base.generation_config.eos_token_id)
    return logits, [
        check_reload(loading),
        check_ties(shares_embeddings(model), shares_embeddings(base)),
        check_eos(model.generation_config.eos_token_id, ends),
    ]


def check_config(plan: MergePlan, folder: Path) -> Check:
    """Compare the config with the base's: only the type may differ."""
    found, expected = read_json(folder / "config.json"), build_config(plan)
    keys = sorted(
        key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
    )
    return Check(
        "config",
        not keys,
        f"differs in {', '.join(keys)}" if keys else f"the base's, in {plan.dtype}",
    )


def compare_logits(
    plan: MergePlan,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    quantized: frozenset[str],
    report: Callable[[str], None],
) -> tuple[list[Check], Distances, Reference | None]:
    """Run base + adapter, its rounded weights and the merged folder on the same sequences."""
    report("proving: the logits of base + adapter in float32")
    policy = load_policy(plan, quantized)
    sequences = continue_greedily(policy, tokenizer, prompts, MAX_NEW_TOKENS)
    logits = list(collect_logits(policy, sequences))
    with policy.disable_adapter():
        bare_base = measure_distance(logits, collect_logits(policy, sequences))
    rounded = round_weights(policy.merge_and_unload(), getattr(torch, plan.dtype))
    noise = measure_distance(logits, collect_logits(rounded, sequences))
    del policy, rounded
    release_memory()
    report("proving: the logits of the merged folder, reloaded")
    found, checks = check_structure(plan, tokenizer, lambda: load_whole(folder), sequences)
    release_memory()
    if found is None:
        return checks, Distances(None, noise, bare_base, None), None
    merged, drift = measure_distance(logits, found), None
    checks += check_distance(merged, noise, ROUNDING_FACTOR)
    if plan.four_bit is not None:
        report("measuring the drift from the 4-bit policy")
        trained = load_adapter(load_4bit_base(plan), plan.record.folder).eval()
        drift = measure_distance(collect_logits(trained, sequences), found)
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    reference = Reference(prompts, ids, sequences, found)
    return checks, Distances(merged, noise, bare_base, drift), reference


def load_policy(plan: MergePlan, quantized: frozenset[str]) -> "PeftModel":
    """Load the base that was merged into, in float32, and put the adapter on it with PEFT."""
    base = load_whole(plan.base_folder)[0]
    with torch.no_grad():
        for name in quantized:
            base.get_parameter(name).copy_(load_weight(plan, name, is_quantized=True))
    return load_adapter(base, plan.record.folder).eval()


def load_whole(folder: Path) -> tuple["PreTrainedModel", dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )


def load_4bit_base(plan: MergePlan) -> "PreTrainedModel":
    """Load the base as the policy was trained on it."""
    placement = choose_placement(plan.record.dtype)
    return load_base(plan.base_folder, placement, True, plan.record.double_quant)


@torch.no_grad()
def round_weights(model: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """Move a float32 model's weights to what a 16-bit type holds of them, and return it.

    The loss is no random noise: of changes below half an ulp nothing is left, and those of a
    trained adapter point one way.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


def check_dequantized(plan: MergePlan, quantized: frozenset[str]) -> Check:
    """Compare the weights that were merged into with those of the model as 4-bit loading has it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    modules = load_4bit_base(plan).named_modules()
    layers = {f"{name}.weight": m.weight for name, m in modules if isinstance(m, Linear4bit)}
    faults = [f"{name} is quantised in one of the two only" for name in layers.keys() ^ quantized]
    for name in layers.keys() & quantized:
        loaded = dequantize_4bit(layers[name].data, layers[name].quant_state).float().cpu()
        if not loaded.equal(load_weight(plan, name, is_quantized=True)):
            faults.append(f"{name} differs")
    count = f"{len(layers)} weights equal the 4-bit model's to the last bit"
    return Check("dequantized_base", not faults, "; ".join(faults[:3]) or count)
