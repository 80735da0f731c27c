"""What each format costs in accuracy: the same held-out problems, answered greedily by the merged
model and by each export, and compared pair by pair."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.export.source import ExportedFormat, Say, Source
from lora_grpo.policy.base import choose_placement, load_tokenizer
from lora_grpo.policy.open import TransformersPolicy
from lora_grpo.proof.reference import quiet_transformers
from lora_grpo.results.evaluate import EvaluateConfig, evaluate_model, held_out_problems
from lora_grpo.results.scoring import mcnemar_p, summarise

if TYPE_CHECKING:
    from lora_grpo.export.config import ExportConfig
    from lora_grpo.policy.open import Policy


def add_accuracy(
    config: "ExportConfig",
    source: Source,
    exported: dict[str, ExportedFormat],
    folders: dict[str, Path],
    say: Say,
) -> dict[str, ExportedFormat]:
    """Return the formats with the accuracy of each file, by its folder, among their figures."""
    asked = EvaluateConfig(adapter_dir=source.record.folder, num_items=config.num_items)
    problems, *_ = held_out_problems(asked, source.record)
    tokenizer = load_tokenizer(source.merged)

    def answer(policy: "Policy", name: str) -> list[Any]:
        say(f"answering {len(problems)} problems: {name}")
        length = source.record.max_completion_length
        return evaluate_model(policy, tokenizer, problems, source.style, length)

    merged = answer(open_folder(source.merged, config.batch_size), "merged")

    def compare(policy: "Policy", name: str) -> dict[str, Any]:
        items = answer(policy, name)
        strict = [[item.strict for item in found] for found in (merged, items)]
        return {
            "num_items": len(items),
            "merged": summarise(merged),
            "export": summarise(items),
            "mcnemar_p": mcnemar_p(*strict),
        }

    measured = dict(exported)
    for name, one in exported.items():
        figures = dict(one.figures)
        files = sorted(folders[name].glob("*.gguf"))
        if not files:
            figures["accuracy"] = compare(open_folder(folders[name], config.batch_size), name)
        for path in files if name != "gguf-adapter" else []:
            quant = path.stem.rpartition("-")[2].lower()
            with open_gguf(path, source.merged, config.batch_size) as policy:
                figures[quant] = {**figures[quant], "accuracy": compare(policy, path.name)}
        measured[name] = replace(one, figures=figures)
    return measured


def open_folder(folder: Path, batch_size: int) -> "Policy":
    """Load a folder in the type that it is stored in, whatever its weights are packed in."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map={"": choose_placement().device},
            trust_remote_code=False,
        ).eval()
    return TransformersPolicy(model, load_tokenizer(folder), batch_size)


@contextmanager
def open_gguf(path: Path, merged: Path, batch_size: int) -> Iterator["Policy"]:
    """Load a GGUF file in llama.cpp, or where that is not installed by transformers."""
    from lora_grpo.export.gguf.llamacpp import LlamaCpp, is_installed
    from lora_grpo.export.gguf.proof import load_file
    from lora_grpo.export.gguf.write import read_model

    if is_installed():
        with closing(LlamaCpp(path, n_ctx=0)) as model:
            yield model
        return
    with quiet_transformers():
        model = load_file(path, read_model(merged))
    yield TransformersPolicy(model, load_tokenizer(merged), batch_size)
