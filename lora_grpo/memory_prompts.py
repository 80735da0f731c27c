"""The longest prompt of a run, counted where the data and the tokenizer lie on this machine.

Reads tokenizer.json and the chat template by themselves, since transformers' tokenizers bring torch
along, which takes longer than the whole plan.
"""

import json
from pathlib import Path
from typing import Any

from lora_grpo.config import TrainConfig
from lora_grpo.dataset import BUILT_IN, read_problems
from lora_grpo.model import EMBEDDED, resolve_model
from lora_grpo.prepare import take_example
from lora_grpo.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    read_system_prompt,
    render,
)

NEEDED = ("tokenizer.json", "tokenizer_config.json")


class LightTokenizer:
    """As much of a transformers tokenizer as `render` and `count_tokens` ask for."""

    def __init__(self, folder: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / NEEDED[0]))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.settings = json.loads((folder / NEEDED[1]).read_text(encoding="utf-8"))
        path = folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.template = environment.from_string(source or self.settings["chat_template"])

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: Any) -> str:
        special = {name: self.settings.get(name) or "" for name in ("bos_token", "eos_token")}
        return self.template.render(messages=messages, **special | settings)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        found = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in found]}


def find_folder(config: TrainConfig) -> Path | None:
    """Return the model's folder if it, its tokenizer and the data are at hand without the Hub."""
    data = config.dataset == BUILT_IN or Path(config.dataset).expanduser().exists()
    if not data or not (config.model == EMBEDDED or Path(config.model).expanduser().is_dir()):
        return None
    folder = resolve_model(config.model, config.revision, weights=False)
    return folder if all((folder / name).is_file() for name in NEEDED) else None


def longest_prompt(config: TrainConfig) -> int | None:
    """Return the tokens of the longest training prompt that is kept; None where it is not local.

    Raises:
        FileNotFoundError, ValueError: data that cannot be read.
    """
    folder = find_folder(config)
    if folder is None:
        return None
    tokenizer = LightTokenizer(folder)
    columns = (config.question_column, config.answer_column)
    reading = read_problems(config.dataset, "train", *columns, "--dataset")
    problems, example = take_example(reading.problems, config.one_shot)
    style = PromptStyle(read_system_prompt(config.system_prompt_file), example)
    texts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    kept = [size for size in count_tokens(tokenizer, texts) if size <= config.max_prompt_length]
    return max(kept, default=None)
