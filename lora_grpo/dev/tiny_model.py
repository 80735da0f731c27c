"""Build the embedded tiny model: train its tokenizer, then pre-train its weights on completions in
mixed styles.

A seed goes in; an ordinary Hugging Face model folder comes out. The model has seen five answer
styles in fixed shares whatever the prompt asks for, as a base model has: it can reason, but rarely
answers as asked.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from lora_grpo.data.arithmetic import PRETRAINING_TEMPLATES, stream_problems
from lora_grpo.data.prompt import Message, build_messages
from lora_grpo.machine.files import staged_directory
from lora_grpo.tasks.task import NUMBER_TASK

PADDING, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STYLES = {
    "bare": (0.30, "{answer}"),
    "answer tag only": (0.15, NUMBER_TASK.write_answer("{answer}")),
    "worked": (0.20, "{steps}\n{answer}"),
    "worked without an answer": (0.10, "{steps}"),
    "the full format": (0.25, NUMBER_TASK.write("{steps}", "{answer}")),
}


@dataclass(frozen=True)
class PretrainConfig:
    """How the embedded model is made."""

    steps: int = 3500
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4


def write_completion(problem: dict[str, str], draw: random.Random) -> str:
    """Answer a problem in a style drawn by its share."""
    steps, answer = problem["answer"].split("\n#### ")
    shares, styles = zip(*STYLES.values(), strict=True)
    return draw.choices(styles, weights=shares)[0].format(steps=steps, answer=answer)


def stream_conversations(seed: int) -> Iterator[tuple[list[Message], str]]:
    """Yield the chat messages of training problems, each with its completion."""
    draw = random.Random(seed)
    for problem in stream_problems("train", seed, PRETRAINING_TEMPLATES):
        yield build_messages(problem["question"]), write_completion(problem, draw)


def train_tokenizer(seed: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE behind Qwen2's own pre-tokenizer, the one that `AutoTokenizer` puts
    back on loading."""
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PADDING, START_OF_TURN, END_OF_TURN],
        show_progress=False,
    )
    texts = (
        "\n".join(part for message in messages for part in message.values())
        + "\nassistant\n"
        + completion
        for messages, completion in islice(stream_conversations(seed), 20_000)
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        extra_special_tokens=[START_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return a model with random weights; the kernels want its embeddings in multiples of 64."""
    torch.manual_seed(config.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads // 2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def stream_batches(
    tokenizer: PreTrainedTokenizerBase, config: PretrainConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `input_ids` and `labels`, each (B, T), padded on the right; only completions carry a
    label."""
    conversations = stream_conversations(config.seed)
    while True:
        rows, labels = [], []
        for messages, completion in islice(conversations, config.batch_size):
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            answer = tokenizer(completion + END_OF_TURN)["input_ids"]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        yield (
            pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad_sequence(labels, batch_first=True, padding_value=-100),
        )


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Warm up linearly, then fall along a cosine to a fiftieth."""
    warm_up = min((step + 1) / config.warmup_steps, 1.0)
    return warm_up * (0.02 + 0.98 * (1 + math.cos(math.pi * step / config.steps)) / 2)


def pretrain(config: PretrainConfig) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """Train the tiny model from scratch; return it in bfloat16, as published models are, with its
    tokenizer."""
    tokenizer = train_tokenizer(config.seed)
    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config)
    )
    started, batches = time.perf_counter(), stream_batches(tokenizer, config)
    for step, (input_ids, labels) in enumerate(islice(batches, config.steps), start=1):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == config.steps:
            seconds = time.perf_counter() - started
            print(f"step {step}/{config.steps}  loss {loss.item():.4f}  {seconds:.0f} s")
    return model.to(torch.bfloat16).eval(), tokenizer


def build_tiny_model(output_dir: Path, seed: int = 0, steps: int | None = None) -> None:
    """Pre-train the model and write its folder.

    Raises:
        FileExistsError: the folder is there already.
    """
    config = PretrainConfig(seed=seed, steps=steps or PretrainConfig.steps)
    model, tokenizer = pretrain(config)
    with staged_directory(output_dir) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
