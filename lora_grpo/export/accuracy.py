"""What each format costs in accuracy: the same held-out problems, answered greedily by the merged
model and by each export, and compared pair by pair."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.export.source import ExportedFormat, Say, Source
from lora_grpo.policy.adapter import read_record, read_train_config
from lora_grpo.policy.base import choose_placement, load_tokenizer
from lora_grpo.results.evaluate import EvaluateConfig, evaluate_model, held_out_problems
from lora_grpo.results.scoring import Item, mcnemar_p, summarise

if TYPE_CHECKING:
    from lora_grpo.policy.open import Policy

DEFAULT_LENGTH, DEFAULT_BATCH = 512, 32


class Accuracy:
    """Answers the first `num_items` held-out problems of a run; does nothing where that is None."""

    def __init__(
        self,
        source: Source,
        num_items: int | None,
        batch_size: int,
        say: Say,
    ) -> None:
        self.source, self.batch_size, self.say = source, batch_size, say
        self.problems, self.merged = [], None
        if num_items is not None:
            asked = EvaluateConfig(adapter_dir=source.records, num_items=num_items)
            self.problems, *_ = held_out_problems(asked, read_record(source.records))

    def add(self, outcome: ExportedFormat, name: str, folder: Path) -> ExportedFormat:
        """Return the outcome with the accuracy of each of its files among the figures."""
        if not self.problems or not all(check.passed for check in outcome.checks):
            return outcome
        figures = dict(outcome.figures)
        for path in sorted(folder.glob("*.gguf")) if name != "gguf-adapter" else []:
            quant = path.stem.rpartition("-")[2].lower()
            with open_gguf(path, self.source.merged) as policy:
                found = self.compare(policy, path.name)
            figures[quant] = {**figures[quant], "accuracy": found}
        if not list(folder.glob("*.gguf")):
            with open_folder(folder, self.batch_size) as policy:
                figures["accuracy"] = self.compare(policy, name)
        return replace(outcome, figures=figures)

    def compare(self, policy: "Policy", name: str) -> dict[str, Any]:
        """Return the figures of `eval.json` for one export, and the paired test against the merged
        model."""
        if self.merged is None:
            self.say(f"answering {len(self.problems)} problems: merged")
            with open_folder(self.source.merged, self.batch_size) as merged:
                self.merged = self.answer(merged)
        self.say(f"answering {len(self.problems)} problems: {name}")
        items = self.answer(policy)
        strict = [[item.strict for item in found] for found in (self.merged, items)]
        return {
            "num_items": len(items),
            "merged": summarise(self.merged),
            "export": summarise(items),
            "mcnemar_p": mcnemar_p(*strict),
        }

    def answer(self, policy: "Policy") -> list[Item]:
        trained = read_train_config(self.source.records)
        length = trained.get("max_completion_length", DEFAULT_LENGTH)
        tokenizer = load_tokenizer(self.source.merged)
        return evaluate_model(policy, tokenizer, self.problems, self.source.style, length)


@contextmanager
def open_folder(folder: Path, batch_size: int) -> Iterator["Policy"]:
    """Load a folder in the type that it is stored in, whatever its weights are packed in."""
    from transformers import AutoModelForCausalLM

    from lora_grpo.policy.open import TransformersPolicy
    from lora_grpo.proof.reference import quiet_transformers

    with quiet_transformers(), redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map={"": choose_placement().device},
            trust_remote_code=False,
        ).eval()
    yield TransformersPolicy(model, load_tokenizer(folder), batch_size)


@contextmanager
def open_gguf(path: Path, merged: Path) -> Iterator["Policy"]:
    """Load a GGUF file in llama.cpp, or where that is not installed by transformers."""
    from lora_grpo.export.gguf.llamacpp import LlamaCpp, is_installed

    if is_installed():
        model = LlamaCpp(path, n_ctx=0)
        try:
            yield model
        finally:
            model.close()
        return
    from lora_grpo.export.gguf.proof import load_file
    from lora_grpo.export.gguf.write import read_model
    from lora_grpo.policy.open import TransformersPolicy
    from lora_grpo.proof.reference import quiet_transformers

    with quiet_transformers():
        model = load_file(path, read_model(merged))
    yield TransformersPolicy(model, load_tokenizer(merged), DEFAULT_BATCH)
