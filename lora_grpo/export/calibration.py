"""What GPTQ calibrates 4-bit weights on: the run's own training prompts with the completions that
its policy sampled last; where these are not on record, built-in problems and the merged model's
greedy answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.export.source import Source
from lora_grpo.machine.files import read_jsonl
from lora_grpo.policy.adapter import COMPLETIONS
from lora_grpo.proof.distance import continue_greedily
from lora_grpo.proof.reference import render_question

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_ROWS, MAX_NEW_TOKENS = 128, 64


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each a prompt and its completion, and where they come from."""

    rows: list[list[int]]
    origin: str


def find_calibration(
    source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> Calibration:
    """Return up to 128 sequences of the run, or of the merged model's own answers."""
    sampled = {row["question"]: row for row in read_jsonl(source.records / COMPLETIONS)}
    if not sampled:
        questions = [row["question"] for row in generate_problems(NUM_ROWS, "train")]
        prompts = [render_question(tokenizer, question, source.style) for question in questions]
        rows = continue_greedily(model, tokenizer, prompts, MAX_NEW_TOKENS)
        return Calibration(rows, f"{len(rows)} built-in problems, answered by the merged model")
    texts = [
        render_question(tokenizer, question, source.style)
        + row["completion"].removeprefix(source.style.prefill)
        + ("" if row["truncated"] else tokenizer.eos_token)
        for question, row in list(sampled.items())[-NUM_ROWS:]
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Calibration(rows, f"{len(rows)} prompts of the run with its last samples")


def load_rows(rows: list[list[int]]) -> "DataLoader":
    """Return what llm-compressor takes: one sequence per step, (1, T)."""
    from torch.utils.data import DataLoader

    ids = [torch.tensor([row]) for row in rows]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(batches, batch_size=None)
