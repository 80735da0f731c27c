"""What every exported model is held against: the merged model's own greedy answers and logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_grpo.arithmetic import generate_problems
from lora_grpo.atomic import read_jsonl
from lora_grpo.export_source import Source
from lora_grpo.logit_distance import collect_logits, continue_greedily
from lora_grpo.merge_proof import MAX_NEW_TOKENS, quiet_transformers
from lora_grpo.prompt import build_messages, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reference:
    """The prompts as text and ids, each with the merged model's greedy answer, and the float32
    logits of its last positions."""

    texts: list[str]
    prompts: list[list[int]]
    sequences: list[list[int]]
    logits: list[torch.Tensor]


def render_prompts(
    source: Source, tokenizer: "PreTrainedTokenizerBase", num_prompts: int
) -> list[str]:
    """Render the first questions that the run was evaluated on, else built-in ones."""
    rows = read_jsonl(source.records / "eval_items.jsonl")
    rows = rows or generate_problems(num_prompts, "test")
    chats = [build_messages(row["question"], source.style) for row in rows[:num_prompts]]
    return [render(tokenizer, chat) for chat in chats]


def observe_merged(source: Source, num_prompts: int) -> Reference:
    """Load the merged model in float32, let it answer, and keep its logits."""
    from transformers import AutoModelForCausalLM

    from lora_grpo.model import load_tokenizer

    tokenizer = load_tokenizer(source.merged)
    texts = render_prompts(source, tokenizer, num_prompts)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            source.merged, dtype=torch.float32, trust_remote_code=False
        ).eval()
        sequences = continue_greedily(model, tokenizer, texts, MAX_NEW_TOKENS)
        logits = list(collect_logits(model, sequences))
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Reference(texts, prompts, sequences, logits)
