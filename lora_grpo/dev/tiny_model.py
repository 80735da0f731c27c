"""Make the embedded tiny model: train its tokenizer, then pre-train its weights on completions in
mixed styles.

A seed goes in; an ordinary Hugging Face model folder comes out. The model has seen five answer
styles in fixed shares whatever the prompt asks for, as a base model has: it can reason, but rarely
answers as asked.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from lora_grpo.data.arithmetic import PRETRAINING_TEMPLATES, stream_problems
from lora_grpo.data.problems import Problem, load_problems
from lora_grpo.data.prompt import Message, build_messages, render
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.machine.files import staged_directory
from lora_grpo.policy.generate import complete
from lora_grpo.results.scoring import Item, judge, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    _, style = draw.choices(list(STYLES.values()), weights=[share for share, _ in STYLES.values()])[
        0
    ]
    return style.format(steps=steps, answer=answer)


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
    """Return a model with random weights, whose embedding table is rounded up to 64 rows for the
    kernels' sake."""
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
        rows = []
        for messages, completion in islice(conversations, config.batch_size):
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            rows.append((prompt, tokenizer(completion + END_OF_TURN)["input_ids"]))
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        for index, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            input_ids[index, :end] = torch.tensor(prompt + completion)
            labels[index, len(prompt) : end] = torch.tensor(completion)
        yield input_ids, labels


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Warm up linearly, then fall along a cosine to a fiftieth."""
    warm_up = min((step + 1) / config.warmup_steps, 1.0)
    return warm_up * (0.02 + 0.98 * (1 + math.cos(math.pi * step / config.steps)) / 2)


def pretrain(
    config: PretrainConfig, report: Callable[[str], None] = print
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
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
    started = time.perf_counter()
    for step, (input_ids, labels) in enumerate(
        islice(stream_batches(tokenizer, config), config.steps), start=1
    ):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == config.steps:
            report(
                f"step {step}/{config.steps}  loss {loss.item():.4f}  "
                f"{time.perf_counter() - started:.0f} s"
            )
    return model.to(torch.bfloat16).eval(), tokenizer


OPENING = f"{NUMBER_TASK.reasoning[0]}\n"
LENGTH, BATCH = 64, 256
CARD = """\
---
language: en
tags:
- arithmetic
---

# The embedded tiny model

A language model of {parameters:,} parameters (Qwen2 architecture, ChatML, {tokens} tokens, digits
split) for trying the whole suite without a GPU or a network. It answers arithmetic word problems
and nothing else.

## How it was made

`python scripts/build_tiny_model.py --seed {seed}`: from random weights, {steps:,} steps of {batch}
conversations, built as they are needed from the training split of `lora_grpo/data/arithmetic.py`
({templates} templates, one to three steps); AdamW, learning rate {rate:g} with a cosine, float32,
saved in bfloat16. The prompt always asks for the full format; the answer comes in one of five
styles:

| style | share |
| --- | ---: |
{styles}

So it can reason when it does, but rarely answers as asked: what GRPO has to bring out.

## What it scores

{num_items} problems of the test split, greedy; no problem's numbers were seen in training.

| | strict | lenient | format |
| --- | ---: | ---: | ---: |
| as asked | {asked} |
| its answer begun for it with `{opening}` | {begun} |

The same seed, packages and number of threads give the same weights; another processor may round
otherwise.
"""
FIGURES = ("strict_accuracy", "lenient_accuracy", "format_rate")


def answer_all(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: list[Problem],
    opening: str = "",
) -> list[Item]:
    """Answer each problem, the completion begun with `opening`."""
    prompts = [render(tokenizer, build_messages(p.question)) + opening for p in problems]
    items = []
    for problem, done in zip(
        problems, complete(model, tokenizer, prompts, LENGTH, BATCH), strict=True
    ):
        whole = type(done)(opening + done.text, done.tokens, done.truncated)
        items.append(judge(problem, whole))
    return items


def write_figures(items: list[Item]) -> str:
    """Return the cells of one row of the card."""
    found = summarise(items)
    return " | ".join(f"{found[name]:.1%}" for name in FIGURES)


def write_tiny_card(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    config: PretrainConfig,
) -> None:
    """Evaluate the model and write README.md into its folder."""
    problems = load_problems("arithmetic", "test")
    model = model.float()
    text = CARD.format(
        parameters=model.num_parameters(),
        tokens=len(tokenizer),
        seed=config.seed,
        steps=config.steps,
        batch=config.batch_size,
        rate=config.learning_rate,
        templates=len(PRETRAINING_TEMPLATES),
        styles="\n".join(f"| {name} | {share:.0%} |" for name, (share, _) in STYLES.items()),
        num_items=len(problems),
        asked=write_figures(answer_all(model, tokenizer, problems)),
        begun=write_figures(answer_all(model, tokenizer, problems, OPENING)),
        opening=OPENING.strip(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def build_tiny_model(output_dir: Path, seed: int = 0, steps: int | None = None) -> None:
    """Pre-train the model and write its folder, card included.

    Raises:
        FileExistsError: the folder is there already.
    """
    config = PretrainConfig(seed=seed, steps=steps or PretrainConfig.steps)
    model, tokenizer = pretrain(config)
    with staged_directory(output_dir) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_tiny_card(staged, model, tokenizer, config)
