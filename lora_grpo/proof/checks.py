"""Checks that every exported transformers folder passes: config, tokenizer, ends, ties."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.policy.base import declared_end_ids, read_config, read_tokenizer
from lora_grpo.proof.distance import Distance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_TEXT = "12 + 34 = 46,  1,200 is $1200.00\n\n\tf(x)  # naïve 数学 😀 <answer>7</answer>"


@dataclass(frozen=True)
class Check:
    """The outcome of one check, with a sentence for people."""

    name: str
    passed: bool
    detail: str


OWN_KEYS = {"dtype", "quantization_config", "transformers_version", "_name_or_path"}


def check_folder(merged: Path, folder: Path, model: "PreTrainedModel") -> list[Check]:
    """Compare what stands around the weights of a loaded folder with the merged one's."""
    tokenizer = read_tokenizer(merged)
    tied = bool(read_config(merged).tie_word_embeddings)
    found = model.generation_config.eos_token_id
    ends = [found] if isinstance(found, int) else found
    return [
        check_same_config(merged, folder),
        check_tokenizer(folder, tokenizer, [PROBE_TEXT]),
        check_generation_config(folder),
        check_eos(ends, declared_end_ids(merged, tokenizer)),
        check_ties(shares_embeddings(model), tied),
    ]


def check_kl(distance: Distance, largest: float, name: str = "kl") -> Check:
    """Compare a model's mean KL from its reference with the largest one allowed."""
    agreed = f"{distance.greedy_agreement:.2%} of {distance.positions} choices agree"
    detail = f"{distance.mean_kl:.3g} nats per token, allowed {largest:g}; {agreed}"
    return Check(name, distance.mean_kl <= largest, detail)


def check_same_config(merged: Path, folder: Path) -> Check:
    """Compare what both configs come to once loaded, but for type and quantisation."""
    found, expected = (read_config(path).to_dict() for path in (folder, merged))
    keys = sorted(
        key
        for key in (found.keys() | expected.keys()) - OWN_KEYS
        if found.get(key) != expected.get(key)
    )
    detail = f"differs in {', '.join(keys)}" if keys else "the merged model's"
    return Check("config", not keys, detail)


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


def check_reload(loading: dict[str, set]) -> Check:
    """Read what transformers said while it loaded the merged folder."""
    faults = [
        f"{kind}: {', '.join(sorted(map(str, found))[:3])}"
        for kind, found in loading.items()
        if found
    ]
    return Check("reload", not faults, "; ".join(faults) or "every weight found its place")


def check_distance(found: Distance, noise: Distance, factor: float) -> list[Check]:
    """Compare a model's distance from its reference with that of noise of the expected size.

    A greedy choice may flip only where the reference's lead was within the logit bound.
    """
    bound, lead = factor * noise.max_logit_difference, found.largest_flipped_margin
    detail = f"differ by up to {found.max_logit_difference:.3g}, allowed {bound:.3g}"
    return [
        Check("logits", found.max_logit_difference <= bound, detail),
        check_kl(found, factor * noise.mean_kl),
        Check("greedy", lead <= bound, f"largest lead lost {lead:.3g}, allowed {bound:.3g}"),
    ]
