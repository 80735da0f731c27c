"""A GGUF file run in llama.cpp, and held against the merged model: ids, ends, logits, answers.

llama.cpp multiplies in the weights' own type (it rounds activations to 8 bits beside 8-bit weights,
to 16 beside 16-bit ones), so its logits differ from those of the same weights in float32.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_grpo.gguf_tokenizer import PROBE
from lora_grpo.llamacpp import LlamaCpp
from lora_grpo.logit_distance import KEPT_POSITIONS, Distance, measure_distance
from lora_grpo.merge_checks import Check
from lora_grpo.model import declared_end_ids, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_grpo.export_reference import Reference


# Mean KL, in nats a token, of llama.cpp's logits from those of the same weights in float32: by the
# weights' bits. The worst seen of the embedded model and SmolLM2-135M is in docs/exports.md.
KL_BOUND_16, KL_BOUND_LESS = 1e-3, 1e-2
SIXTEEN_BITS = ("f16", "bf16")


def prove_in_llamacpp(
    path: Path,
    folder: Path,
    seen: "Reference",
    expected: list[torch.Tensor],
    quant: str,
    lora: Path | None = None,
) -> tuple[list[Check], dict[str, Any]]:
    """Run a file, and maybe a LoRA file on it, on the merged model's sequences; `expected` holds
    the logits of the same weights in float32.

    Returns the checks, and how far llama.cpp is from the merged model and from `expected`.
    """
    tokenizer = read_tokenizer(folder)
    room = max(map(len, seen.sequences)) + 1
    model = LlamaCpp(path, room, lora, keep_logits=True)
    try:
        logits = [
            torch.from_numpy(model.logits(sequence, KEPT_POSITIONS)) for sequence in seen.sequences
        ]
        same = count_same_answers(model, seen)
        checks = [
            check_ids(model, tokenizer, seen.texts),
            check_ends(model, declared_end_ids(folder, tokenizer)),
        ]
    finally:
        model.close()
    distance = measure_distance(expected, logits)
    checks.append(check_llamacpp_distance(distance, quant))
    figures = {
        "llamacpp_from_same_weights": asdict(distance),
        "llamacpp_from_merged": asdict(measure_distance(seen.logits, logits)),
        "llamacpp_same_answers": f"{same} of {len(seen.sequences)}",
    }
    return checks, figures


def count_same_answers(model: LlamaCpp, seen: "Reference") -> int:
    """Return for how many prompts llama.cpp's greedy answer is the merged model's, id by id."""
    pairs = zip(seen.prompts, seen.sequences, strict=True)
    return sum(
        model.continue_greedily(prompt, len(sequence) - len(prompt)) == sequence[len(prompt) :]
        for prompt, sequence in pairs
    )


def check_llamacpp_distance(distance: Distance, quant: str) -> Check:
    """Hold llama.cpp's distance from the same weights in float32 against the bound."""
    bound = KL_BOUND_16 if quant in SIXTEEN_BITS else KL_BOUND_LESS
    agreed = f"{distance.greedy_agreement:.2%} of {distance.positions} choices agree"
    detail = f"{distance.mean_kl:.3g} nats a token, allowed {bound:g}; {agreed}"
    return Check("llamacpp_logits", distance.mean_kl <= bound, detail)


def check_ids(model: LlamaCpp, tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Check:
    """Tokenize prompts and a probe in llama.cpp and by the merged folder's tokenizer."""
    probes = [*texts, PROBE, "".join(tokenizer.all_special_tokens)]
    different = [
        text
        for text in probes
        if model.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    detail = f"{len(different)} of {len(probes)} texts get other ids"
    return Check("llamacpp_tokens", not different, detail)


def check_ends(model: LlamaCpp, ends: list[int]) -> Check:
    """Ask llama.cpp whether it stops at every token that ends a completion."""
    missed = [token for token in ends if not model.ends(token)]
    detail = f"it goes on after {missed}" if missed else f"stops at {ends}"
    return Check("llamacpp_end", not missed, detail)
