"""The proof of a merge: reload the folder and compare it with base + adapter, both in float32.

Rounding to 16 bits moves a weight by up to half an ulp, so no merge equals its policy. What that
does to the logits is measured, not guessed: the policy's own weights are rounded, as PEFT computes
them, and the merged model may be little further from the policy than that takes it.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_grpo.arithmetic import generate_problems
from lora_grpo.atomic import read_jsonl
from lora_grpo.logit_distance import Distance, collect_logits, continue_greedily, measure_distance
from lora_grpo.merge_checks import (
    ROUNDING_FACTOR,
    Check,
    check_config,
    check_dequantized,
    check_distance,
    check_eos,
    check_generation_config,
    check_reload,
    check_tensors,
    check_ties,
    check_tokenizer,
    shares_embeddings,
)
from lora_grpo.merge_inputs import MergePlan
from lora_grpo.merge_reference import load_policy, round_weights
from lora_grpo.merge_weights import find_quantized
from lora_grpo.model import (
    choose_placement,
    load_adapter,
    load_base,
    merge_end_ids,
    read_tokenizer,
)
from lora_grpo.prompt import build_messages, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Proof:
    """The checks, and the distances that they rest on.

    From base + adapter: the merged model (None if it cannot be loaded), rounding noise, the bare
    base. Where the policy was trained in 4-bit, also the merged model from that policy; this has no
    bound.
    """

    checks: tuple[Check, ...]
    merged: Distance | None
    rounding_noise: Distance
    bare_base: Distance
    from_4bit_policy: Distance | None

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
    prompts = build_prompts(plan, tokenizer, num_prompts)
    quantized = find_quantized(plan)
    with quiet_transformers():
        report("proving: base + adapter in float32")
        policy = observe_policy(plan, folder, tokenizer, prompts, quantized)
        report("proving: the merged folder, reloaded")
        logits, checks = observe_merged(folder, policy)
        merged = drift = None
        if logits is not None:
            merged = measure_distance(policy.logits, logits)
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
    return Proof(tuple(checks), merged, policy.rounding_noise, policy.bare_base, drift)


def build_prompts(
    plan: MergePlan, tokenizer: "PreTrainedTokenizerBase", num_prompts: int
) -> list[str]:
    """Render the first questions that the adapter was evaluated on, else built-in ones."""
    rows = read_jsonl(plan.adapter_dir / "eval_items.jsonl") or generate_problems(
        num_prompts, "test"
    )
    chats = [build_messages(row["question"], plan.style) for row in rows[:num_prompts]]
    if tokenizer.chat_template is None:
        return ["\n\n".join(message["content"] for message in chat) for chat in chats]
    return [render(tokenizer, chat) for chat in chats]


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


def release_memory() -> None:
    """Free the last model for good: the C library keeps blocks of it until it is told otherwise."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings away; what matters becomes a check."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
