"""A GGUF file and an Ollama Modelfile: template, stop tokens, system prompt and parameters."""

from collections.abc import Callable
from pathlib import Path

from lora_grpo.adapter import read_train_config
from lora_grpo.atomic import write_text
from lora_grpo.export_config import plain_name
from lora_grpo.export_gguf import name_file, write_gguf
from lora_grpo.export_reference import Reference
from lora_grpo.export_source import Outcome, Request, Source
from lora_grpo.merge_checks import Check
from lora_grpo.model import load_tokenizer
from lora_grpo.ollama_modelfile import build_modelfile, parse_modelfile
from lora_grpo.ollama_proof import prove_modelfile
from lora_grpo.ollama_template import build_template, probe

MODELFILE = "Modelfile"


def check_ollama(request: Request, quants: tuple[str, ...]) -> None:
    """Raise a ValueError for a chat template that a Modelfile cannot say, or several types."""
    if len(quants) > 1:
        raise ValueError(
            f"--format ollama takes one --quant, got {' '.join(quants)}: a Modelfile names one file"
        )
    build_template(probe(load_tokenizer(request.tokenizer_folder)))


def write_ollama(
    source: Source, folder: Path, quant: str, seen: Reference, report: Callable[[str], None]
) -> Outcome:
    """Write the GGUF file and its Modelfile, and prove both.

    Raises:
        ValueError: a weight does not fit the type, or the system prompt cannot be said.
    """
    outcome = write_gguf(source, folder, (quant,), seen, report)
    length = read_train_config(source.records).get("max_completion_length")
    text = build_modelfile(source.merged, name_file(source, quant), source.style, length)
    write_text(folder / MODELFILE, text)
    report(f"proving {MODELFILE}")
    checks = prove_modelfile_at(folder / MODELFILE, source)
    name = plain_name(source.name)
    commands = (("ollama", "create", name, "-f", Path(MODELFILE)), ("ollama", "run", name))
    return Outcome((*outcome.checks, *checks), outcome.figures, commands)


def prove_modelfile_at(path: Path, source: Source) -> list[Check]:
    """Prove a Modelfile as it lies on disk, the file that it names included."""
    text = path.read_text(encoding="utf-8")
    checks = prove_modelfile(text, source.merged, source.style)
    if any(check.name == "modelfile" and not check.passed for check in checks):
        return checks
    named = dict(parse_modelfile(text))["FROM"]
    there = (path.parent / named).is_file()
    return [*checks, Check("from", there, f"{named} {'lies beside it' if there else 'is missing'}")]
