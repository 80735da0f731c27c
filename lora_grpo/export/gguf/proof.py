"""The proof of a GGUF file: read back with other code than wrote it, and held against the merged
model.

transformers reads the tensors, a tokenizer is built from what the file says, and the model that
comes out may be as far from the merged one as random noise within the type's bound takes it. Where
llama.cpp is installed, it runs the file too.
"""

from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_grpo.export.gguf.quants import QUANTS, count_faults, error_bound
from lora_grpo.export.gguf.tokenizer import (
    PROBE,
    Vocabulary,
    build_tokenizer,
    describe_tokenizer,
    read_vocabulary,
)
from lora_grpo.export.gguf.write import ROPE_FREQUENCIES, GGUFModel, describe_model, name_map
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.tensors import read_tensor
from lora_grpo.policy.base import declared_end_ids, read_tokenizer
from lora_grpo.proof.checks import PROBE_TEXT, Check, check_distance, shares_embeddings
from lora_grpo.proof.distance import Distance, collect_logits, measure_distance
from lora_grpo.proof.reference import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_grpo.proof.reference import Reference

# llama.cpp names these beside the end of a turn; it stops at all of them.
ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Proof:
    """The checks of one file, and its distances from the merged model."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]


def prove_file(path: Path, folder: Path, model: GGUFModel, quant: str, seen: "Reference") -> Proof:
    """Read a GGUF file back and compare it with the merged folder that it was made from."""
    from gguf import GGUFReader

    from lora_grpo.export.gguf.llamacpp import is_installed

    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        return Proof((Check("read", False, f"gguf cannot read it: {error}"),), {})
    checks = [check_keys(reader, model, quant), *check_vocabulary(reader, folder, seen.texts)]
    with quiet_transformers():
        logits, found = observe_file(path, reader, model, seen)
        checks += found
        figures = {"bytes": path.stat().st_size, "types": count_types(reader)}
        if logits is not None:
            distance = measure_distance(seen.logits, logits)
            noise = observe_noise(folder, reader, model, seen)
            checks += check_distance(distance, noise)
            figures |= {"from_merged": asdict(distance), "noise_from_merged": asdict(noise)}
    if logits is not None and is_installed():
        from lora_grpo.export.gguf.llamacpp import prove_in_llamacpp

        found, measured = prove_in_llamacpp(path, folder, seen, logits, quant)
        checks += found
        figures |= measured
    return Proof(tuple(checks), figures)


def count_types(reader: "GGUFReader") -> dict[str, int]:
    """Return how many tensors are of each type."""
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def check_keys(reader: "GGUFReader", model: GGUFModel, quant: str) -> Check:
    """Compare the architecture's keys with the merged model's config."""

    def get(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    expected = {f"{model.architecture}.{k}": v for k, v in describe_model(model.config).items()}
    expected |= {"general.architecture": model.architecture, "general.type": "model"}
    expected |= {"general.file_type": QUANTS[quant].file_type}
    faults = []
    for key, value in expected.items():
        found = get(key)
        wanted = float(np.float32(value)) if isinstance(value, float) else value
        if found != wanted:
            faults.append(f"{key} is {found}, expected {wanted}")
    return Check("keys", not faults, "; ".join(faults[:3]) or f"{len(expected)} keys as expected")


def check_vocabulary(reader: "GGUFReader", folder: Path, texts: list[str]) -> list[Check]:
    """Compare tokenizer, ends and chat template with the merged folder's, and tokenize texts by
    what the file alone says."""
    tokenizer = read_tokenizer(folder)
    ends = declared_end_ids(folder, tokenizer)
    found = read_vocabulary(reader)
    expected = describe_tokenizer(tokenizer, len(found.tokens), ends)
    named = [found.special[name] for name in ENDS if name in found.special]
    templates = found.chat_template == expected.chat_template
    return [
        check_tokens(found, expected, tokenizer, texts),
        Check("eos", named == ends, f"ends with {named}, expected {ends}"),
        check_bos(found, expected),
        Check("chat_template", templates, f"{'' if templates else 'not '}the tokenizer's own"),
    ]


def check_bos(found: Vocabulary, expected: Vocabulary) -> Check:
    """Compare whether BOS is put in front of a text, and the ids of BOS, padding and unknown."""

    def describe(vocabulary: Vocabulary) -> str:
        ids = {name: id for name, id in vocabulary.special.items() if name not in ENDS}
        return f"{ids}, BOS {'' if vocabulary.add_bos else 'not '}added"

    passed = describe(found) == describe(expected)
    detail = "" if passed else f", expected {describe(expected)}"
    return Check("special_tokens", passed, describe(found) + detail)


def check_tokens(
    found: Vocabulary,
    expected: Vocabulary,
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
) -> Check:
    """Compare tokens, types and merges, and the ids of texts with unicode, digits and specials."""
    faults = [
        f"its {name} differ"
        for name in ("pre", "tokens", "types", "merges")
        if getattr(found, name) != getattr(expected, name)
    ]
    probes = [*texts, PROBE, PROBE_TEXT, "".join(tokenizer.all_special_tokens)]
    try:
        rebuilt = build_tokenizer(found)
    except (ValueError, KeyError) as error:
        return Check("tokenizer", False, "; ".join([*faults, str(error)]))
    different = sum(
        rebuilt.encode(text, add_special_tokens=False).ids
        != tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in probes
    )
    if different:
        faults.append(f"{different} of {len(probes)} texts get other ids")
    count = f"{len(found.tokens)} tokens, {len(found.merges)} merges"
    detail = "; ".join(faults) or f"{count}; {len(probes)} texts get the same ids"
    return Check("tokenizer", not faults, detail)


def observe_file(
    path: Path, reader: "GGUFReader", model: GGUFModel, seen: "Reference"
) -> tuple[list[torch.Tensor] | None, list[Check]]:
    """Load a file with transformers, compare every tensor, and return its logits on the merged
    model's sequences."""
    release_memory()
    try:
        loaded = load_file(path, model)
        logits = list(collect_logits(loaded, seen.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return None, [Check("reload", False, f"{type(error).__name__}: {error}")]
    tied, expected = shares_embeddings(loaded), bool(model.config.tie_word_embeddings)
    words = {True: "tied", False: "not tied"}
    return logits, [
        check_tensors(loaded, reader, model),
        Check("tied_embeddings", tied == expected, f"{words[tied]}, expected {words[expected]}"),
    ]


def load_file(path: Path, model: GGUFModel) -> "PreTrainedModel":
    """Load a file with transformers, in float32, without the bar that it would draw."""
    from transformers import AutoModelForCausalLM

    with redirect_stderr(StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=model.config,
            dtype=torch.float32,
            trust_remote_code=False,
        ).eval()


def paired_weights(
    loaded: "PreTrainedModel", reader: "GGUFReader", model: GGUFModel
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Yield GGUF's name, type, the loaded parameter and the merged weight in float32."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    names = name_map(model.config)
    for name, parameter in loaded.named_parameters():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in kinds and stored in model.tensors:
            merged = read_tensor(model.tensors[stored]).float()
            yield stored, kinds[stored], parameter, merged


def check_tensors(loaded: "PreTrainedModel", reader: "GGUFReader", model: GGUFModel) -> Check:
    """Compare every tensor with the merged one, within the bound of its type."""
    held = {tensor.name for tensor in reader.tensors} - {ROPE_FREQUENCIES}
    faults = [f"{name} does not belong there" for name in sorted(held - model.tensors.keys())]
    missing = set(model.tensors)
    for name, kind, parameter, merged in paired_weights(loaded, reader, model):
        missing.discard(name)
        count, worst = count_faults(merged.numpy(), parameter.detach().numpy(), kind)
        if count:
            faults.append(
                f"{name}: {count} of {merged.numel()} values off by up to {worst:.3g}, "
                f"more than {kind} may"
            )
    faults += [f"{name} is missing" for name in sorted(missing)]
    detail = "; ".join(faults[:3]) or f"{len(model.tensors)} tensors, all within their type's bound"
    return Check("tensors", not faults, detail)


def observe_noise(
    folder: Path, reader: "GGUFReader", model: GGUFModel, seen: "Reference"
) -> Distance:
    """Measure how far random noise within the bounds takes the merged model from itself."""
    from transformers import AutoModelForCausalLM

    release_memory()
    noisy = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, kind, parameter, merged in paired_weights(noisy, reader, model):
            bound = torch.from_numpy(np.ascontiguousarray(error_bound(merged.numpy(), kind)))
            parameter.add_(bound * torch.rand(bound.shape, generator=generator).mul_(2).sub_(1))
    return measure_distance(seen.logits, collect_logits(noisy, seen.sequences))
