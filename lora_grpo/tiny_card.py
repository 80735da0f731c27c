"""The embedded model, built by one call, and its card: how it was made and what it scores."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.arithmetic import PRETRAINING_TEMPLATES
from lora_grpo.atomic import staged_directory
from lora_grpo.dataset import Problem, load_problems
from lora_grpo.pretrain import STYLES, PretrainConfig, pretrain
from lora_grpo.prompt import build_messages, render
from lora_grpo.rollout import complete
from lora_grpo.scoring import Item, judge, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPENING = "<reasoning>\n"
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
conversations, built as they are needed from the training split of `lora_grpo/arithmetic.py`
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
| its answer begun for it with `<reasoning>` | {begun} |

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


def describe(items: list[Item]) -> str:
    """Return the figures of a row of the card."""
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
        asked=describe(answer_all(model, tokenizer, problems)),
        begun=describe(answer_all(model, tokenizer, problems, OPENING)),
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
