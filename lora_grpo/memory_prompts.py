"""The longest prompt of a run, counted where the data and the tokenizer lie on this machine.

Reads tokenizer.json and the chat template by themselves, since transformers' tokenizers bring torch
along, which takes longer than the whole plan.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_grpo.config import TrainConfig
from lora_grpo.dataset import BUILT_IN, read_problems
from lora_grpo.model import EMBEDDED, choose_template, resolve_model
from lora_grpo.prepare import take_example
from lora_grpo.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    has_system_role,
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
        self.name_or_path = str(folder)
        self.chat_template = find_template(folder, self.settings)
        self.environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: Any) -> str:
        special = {name: self.settings.get(name) or "" for name in ("bos_token", "eos_token")}
        template = self.environment.from_string(self.chat_template)  # compiled once, then cached
        return template.render(messages=messages, **special | settings)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        found = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in found]}


def find_template(folder: Path, settings: dict[str, Any]) -> str:
    """Return the chat template that training would render."""
    path, held = folder / "chat_template.jinja", settings.get("chat_template")
    if isinstance(held, list):
        held = {named["name"]: named["template"] for named in held}
    template = choose_template(folder, path.read_text(encoding="utf-8") if path.is_file() else held)
    if template is None:
        raise ValueError(f"{folder} has no chat template: use an instruct model")
    return template


def raise_exception(reason: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(reason)


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
    system_prompt, system_role = (
        read_system_prompt(config.system_prompt_file),
        has_system_role(tokenizer),
    )
    style = PromptStyle(system_prompt, example, system_role)
    texts = [render(tokenizer, build_messages(problem.question, style)) for problem in problems]
    kept = [size for size in count_tokens(tokenizer, texts) if size <= config.max_prompt_length]
    return max(kept, default=None)
