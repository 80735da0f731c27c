"""Questions become chat prompts: the system prompt that asks for the tags, maybe an example."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.dataset import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Qwen3's template would have the model think before the reasoning that the prompt asks for; others
# have no such setting and ignore it.
TEMPLATE_SETTINGS = {"enable_thinking": False}
SYSTEM_PROMPT = """\
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

Message = dict[str, str]


@dataclass(frozen=True)
class PromptStyle:
    """What stands around each question: a system prompt, and maybe one worked example."""

    system_prompt: str = SYSTEM_PROMPT
    example: Problem | None = None


PLAIN = PromptStyle()


def read_system_prompt(path: Path | None) -> str:
    """Return the text of a system prompt file, or the built-in prompt.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is blank or not UTF-8 text.
    """
    if path is None:
        return SYSTEM_PROMPT
    if not path.is_file():
        raise FileNotFoundError(f"--system-prompt-file {path} does not exist: give a text file")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--system-prompt-file {path} is not UTF-8 text ({error.reason}): convert it"
        ) from None
    if not text:
        raise ValueError(f"--system-prompt-file {path} is blank: write the prompt in it")
    return text


def perfect_completion(problem: Problem) -> str:
    """Return the completion that the prompt asks for, GSM8K's `<<calculations>>` left out."""
    reasoning = re.sub(r"<<[^<>]*>>", "", problem.solution or problem.answer)
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{problem.answer}\n</answer>"


def build_messages(question: str, style: PromptStyle = PLAIN) -> list[Message]:
    """Return the chat messages of one prompt."""
    messages = [{"role": "system", "content": style.system_prompt}]
    if style.example:
        messages += [
            {"role": "user", "content": style.example.question},
            {"role": "assistant", "content": perfect_completion(style.example)},
        ]
    return [*messages, {"role": "user", "content": question}]


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> str:
    """Return the text that the model continues."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **TEMPLATE_SETTINGS
    )


def keep_settings(template: str) -> str:
    """Return a chat template that has `TEMPLATE_SETTINGS` as its defaults, where it knows them, so
    that whoever runs the model asks as it was asked in training."""
    defaults = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {str(value).lower()} %}}"
        "{%- endif -%}\n"
        for name, value in TEMPLATE_SETTINGS.items()
        if name in template
    ]
    return "".join([*defaults, template])


def count_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> list[int]:
    """Return each text's length in tokens, the template's own special tokens counted once."""
    batch = list(texts)
    if not batch:  # of which a tokenizer makes an IndexError
        return []
    return [len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]]
