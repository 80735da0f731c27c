"""The proof of a GGUF file: read back with other code than wrote it, and compared with the merged
model.

transformers reads the tensors, a tokenizer is built from what the file says, and the logits of the
model that comes out are compared with the merged model's. Where llama.cpp is installed, it runs the
file too.
"""

from collections import Counter
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_grpo.export.gguf.quants import QUANTS, find_fault
from lora_grpo.export.gguf.tokenizer import (
    PROBE,
    Vocabulary,
    build_tokenizer,
    describe_tokenizer,
    read_vocabulary,
)
from lora_grpo.export.gguf.write import ROPE_FREQUENCIES, GGUFModel, describe_model, name_map
from lora_grpo.export.source import ExportedFormat
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.tensors import read_tensor
from lora_grpo.policy.base import declared_end_ids, read_tokenizer
from lora_grpo.proof.checks import (
    PROBE_TEXT,
    Check,
    check_kl,
    check_ties,
    shares_embeddings,
)
from lora_grpo.proof.distance import collect_logits, measure_distance
from lora_grpo.proof.reference import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_grpo.proof.reference import Reference

# llama.cpp names these beside the end of a turn; it stops at all of them.
ENDS = ("eos", "eot", "eom")


def prove_file(
    path: Path, folder: Path, model: GGUFModel, quant: str, reference: "Reference"
) -> ExportedFormat:
    """Read a GGUF file back and compare it with the merged folder that it was made from."""
    from gguf import GGUFReader

    from lora_grpo.export.gguf.llamacpp import is_installed

    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        return ExportedFormat((Check("read", False, f"gguf cannot read it: {error}"),), {})
    checks = [check_keys(reader, model, quant), *check_vocabulary(reader, folder, reference.texts)]
    with quiet_transformers():
        logits, found = observe_file(path, reader, model, quant, reference)
        checks += found
        types = Counter(sorted(tensor.tensor_type.name for tensor in reader.tensors))
        figures: dict[str, Any] = {"bytes": path.stat().st_size, "types": types}
        if logits is not None:
            distance = measure_distance(reference.logits, logits)
            checks.append(check_kl(distance, QUANTS[quant].largest_kl))
            figures["from_merged"] = asdict(distance)
    if logits is not None and is_installed():
        from lora_grpo.export.gguf.llamacpp import prove_in_llamacpp

        found, measured = prove_in_llamacpp(path, folder, reference, logits, quant)
        checks += found
        figures |= measured
    return ExportedFormat(tuple(checks), figures)


def check_keys(reader: "GGUFReader", model: GGUFModel, quant: str) -> Check:
    """Compare the architecture's keys with the merged model's config."""
    expected = {f"{model.architecture}.{k}": v for k, v in describe_model(model.config).items()}
    expected |= {"general.architecture": model.architecture, "general.type": "model"}
    expected |= {"general.file_type": QUANTS[quant].file_type}
    faults = []
    for key, value in expected.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
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
    others, wanted = (
        {name: index for name, index in vocabulary.special.items() if name not in ENDS}
        | {"BOS added": vocabulary.add_bos}
        for vocabulary in (found, expected)
    )
    same = found.chat_template == expected.chat_template
    return [
        check_tokens(found, expected, tokenizer, texts),
        Check("eos", named == ends, f"ends with {named}, expected {ends}"),
        Check("special_tokens", others == wanted, f"{others}, expected {wanted}"),
        Check("chat_template", same, f"{'' if same else 'not '}the tokenizer's own"),
    ]


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
    path: Path, reader: "GGUFReader", model: GGUFModel, quant: str, reference: "Reference"
) -> tuple[list[torch.Tensor] | None, list[Check]]:
    """Load a file with transformers, compare every tensor, and return its logits on the merged
    model's sequences."""
    release_memory()
    try:
        loaded = load_file(path, model)
        logits = list(collect_logits(loaded, reference.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return None, [Check("reload", False, f"{type(error).__name__}: {error}")]
    tied = bool(model.config.tie_word_embeddings)
    by_llamacpp = QUANTS[quant].needs_llamacpp
    return logits, [
        check_tensors(loaded, reader, model, by_llamacpp),
        check_ties(shares_embeddings(loaded), tied),
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


def check_tensors(
    loaded: "PreTrainedModel", reader: "GGUFReader", model: GGUFModel, by_llamacpp: bool
) -> Check:
    """Compare every loaded tensor with what its type makes of the merged one."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    extra = sorted(kinds.keys() - model.tensors.keys() - {ROPE_FREQUENCIES})
    faults = [f"{name} does not belong there" for name in extra]
    missing, names = set(model.tensors), name_map(model.config)
    for parameter_name, parameter in loaded.named_parameters():
        name = names.get_name(parameter_name, try_suffixes=(".weight", ".bias"))
        if name in kinds and name in missing:
            missing.discard(name)
            merged = read_tensor(model.tensors[name]).float().numpy()
            found = parameter.detach().numpy()
            if fault := find_fault(merged, found, kinds[name], by_llamacpp):
                faults.append(f"{name} in {kinds[name]}: {fault}")
    faults += [f"{name} is missing" for name in sorted(missing)]
    detail = "; ".join(faults[:3]) or f"{len(model.tensors)} tensors are the merged ones, by type"
    return Check("tensors", not faults, detail)
