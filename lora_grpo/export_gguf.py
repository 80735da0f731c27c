"""A merged model as GGUF files, one a type of weights, for llama.cpp and what is built on it.

Up to 8 bits Python's gguf writes them; K-quants are llama.cpp's, made from a 16-bit file of ours.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lora_grpo.export_config import plain_name
from lora_grpo.export_reference import Reference
from lora_grpo.export_report import SYSTEM_PROMPT
from lora_grpo.export_source import Outcome, Request, Source
from lora_grpo.gguf_model import GGUFModel, check_config, read_model
from lora_grpo.gguf_proof import prove_file
from lora_grpo.gguf_quants import QUANTS
from lora_grpo.gguf_tokenizer import Vocabulary, describe_tokenizer
from lora_grpo.gguf_write import write_model
from lora_grpo.llamacpp import HOW_TO_INSTALL, can_quantize, quantize_file
from lora_grpo.model import declared_end_ids, read_config, read_tokenizer

Report = Callable[[str], None]
ASKING = ("--jinja", "-sysf", Path(SYSTEM_PROMPT), "--temp", "0")


def check_gguf(request: Request, quants: tuple[str, ...]) -> None:
    """Raise a ValueError for a model that GGUF is not written of here, or a type that llama.cpp
    would have to make and cannot."""
    config = read_config(request.model_folder)
    check_config(config, request.model_folder)
    tokenizer = read_tokenizer(request.tokenizer_folder)
    ends = declared_end_ids(request.model_folder, tokenizer)
    describe_tokenizer(tokenizer, config.vocab_size, ends)
    needing = [quant for quant in quants if QUANTS[quant].needs_llamacpp]
    if needing and not can_quantize():
        raise ValueError(
            f"--quant {' '.join(needing)} is made by llama.cpp, which is not here: {HOW_TO_INSTALL}"
        )


def describe_vocabulary(folder: Path, model: GGUFModel) -> Vocabulary:
    """Return a merged folder's tokenizer as GGUF holds it."""
    tokenizer = read_tokenizer(folder)
    ends = declared_end_ids(folder, tokenizer)
    return describe_tokenizer(tokenizer, model.config.vocab_size, ends)


def make_file(path: Path, source: Source, quant: str) -> GGUFModel:
    """Write one GGUF file of the merged model, by llama.cpp where the type asks for it."""
    model = read_model(source.merged)
    vocabulary = describe_vocabulary(source.merged, model)
    if not QUANTS[quant].needs_llamacpp:
        write_model(path, model, vocabulary, quant, source.name)
        return model
    exact = path.with_name(f".{path.name}.16bit")
    write_model(exact, model, vocabulary, sixteen_bit(model), source.name)
    quantize_file(exact, path, quant)
    exact.unlink()
    return model


def sixteen_bit(model: GGUFModel) -> str:
    """Return the type of 16 bits that holds the merged weights as they are."""
    return "f16" if {tensor.dtype for tensor in model.tensors.values()} == {"F16"} else "bf16"


def name_file(source: Source, quant: str) -> str:
    """Return a file's name, in the way of the Hub's GGUF repositories."""
    return f"{plain_name(source.name)}-{quant.upper()}.gguf"


def write_gguf(
    source: Source, folder: Path, quants: tuple[str, ...], seen: Reference, report: Report
) -> Outcome:
    """Write and prove a file for each type.

    Raises:
        ValueError: a weight does not fit a type.
        RuntimeError: llama.cpp did not quantise.
    """
    checks, figures, commands = [], {}, []
    for quant in quants:
        path = folder / name_file(source, quant)
        model = make_file(path, source, quant)
        report(f"proving {path.name}")
        proof = prove_file(path, source.merged, model, quant, seen)
        checks += [replace(check, name=f"{quant} {check.name}") for check in proof.checks]
        figures[quant] = proof.figures
        commands.append(("llama-cli", "-m", Path(path.name), *ASKING))
    return Outcome(tuple(checks), figures, tuple(commands))
