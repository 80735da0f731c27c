"""What every exported model is compared with: the merged model's own greedy answers and logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.data.prompt import PromptStyle, build_messages, render
from lora_grpo.machine.files import read_jsonl
from lora_grpo.policy.adapter import EVAL_ITEMS
from lora_grpo.proof.distance import collect_logits, continue_greedily

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 32


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


@dataclass(frozen=True)
class Reference:
    """The prompts as text and ids, each with the merged model's greedy answer, and the float32
    logits of its last positions."""

    texts: list[str]
    prompts: list[list[int]]
    sequences: list[list[int]]
    logits: list[torch.Tensor]


def render_prompts(
    records: Path, style: PromptStyle, tokenizer: "PreTrainedTokenizerBase", num_prompts: int
) -> list[str]:
    """Render the first questions that the run was evaluated on, else built-in ones."""
    rows = read_jsonl(records / EVAL_ITEMS)
    rows = rows or generate_problems(num_prompts, "test")
    return [render_question(tokenizer, row["question"], style) for row in rows[:num_prompts]]


def render_question(tokenizer: "PreTrainedTokenizerBase", question: str, style: PromptStyle) -> str:
    """Return one prompt: without a chat template, the messages one after another."""
    chat = build_messages(question, style)
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in chat)
    return render(tokenizer, chat)


def observe_merged(merged: Path, records: Path, style: PromptStyle, num_prompts: int) -> Reference:
    """Load the merged model in float32, let it answer, and keep its logits; `records` is the folder
    with the run's records."""
    from transformers import AutoModelForCausalLM

    from lora_grpo.policy.base import load_tokenizer

    tokenizer = load_tokenizer(merged)
    texts = render_prompts(records, style, tokenizer, num_prompts)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            merged, dtype=torch.float32, trust_remote_code=False
        ).eval()
        sequences = continue_greedily(model, tokenizer, texts, MAX_NEW_TOKENS)
        logits = list(collect_logits(model, sequences))
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Reference(texts, prompts, sequences, logits)
