"""Questions become chat prompts: the system prompt that asks for the tags, maybe an example.

What a chat template does with them is found out by rendering a probe: whether it has a system turn,
what it writes of the answer itself, and which token ends a turn.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lora_grpo.data.problems import Problem
from lora_grpo.tasks.task import NUMBER_TASK, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Qwen3's template would have the model think before the reasoning that the prompt asks for; others
# have no such setting and ignore it.
TEMPLATE_SETTINGS = {"enable_thinking": False}
# A block that the template opens and closes itself, as Qwen3's does to leave the thinking out.
CLOSED_BLOCK = re.compile(r"<(\w+)>.*?</\1>\s*", re.DOTALL)

Message = dict[str, str]
SYSTEM_PROBE: Message = {"role": "system", "content": "systemprobe"}
QUESTION_PROBE: Message = {"role": "user", "content": "questionprobe"}
ANSWER_PROBE: Message = {"role": "assistant", "content": "answerprobe"}


@dataclass(frozen=True)
class PromptStyle:
    """What stands around each question: a system prompt, and maybe one worked example.

    Where the chat template has no system turn (`system_role`), the system prompt opens the first
    user turn. `prefill` is what the template writes of the answer itself, such as `<think>`: the
    completion that is scored begins with it. `fit_style` finds both out.
    """

    system_prompt: str = NUMBER_TASK.system_prompt
    example: Problem | None = None
    system_role: bool = True
    prefill: str = ""
    task: Task = NUMBER_TASK


PLAIN = PromptStyle()


def read_system_prompt(path: Path | None, task: Task = NUMBER_TASK) -> str:
    """Return the text of a system prompt file, or the task's own prompt.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is blank or not UTF-8 text.
    """
    if path is None:
        return task.system_prompt
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


def perfect_completion(problem: Problem, task: Task = NUMBER_TASK) -> str:
    """Return the completion that the prompt asks for, GSM8K's `<<calculations>>` left out."""
    reasoning = re.sub(r"<<[^<>]*>>", "", problem.solution or problem.answer)
    return task.write(reasoning, task.write_gold(problem.answer))


def build_messages(question: str, style: PromptStyle = PLAIN) -> list[Message]:
    """Return the chat messages of one prompt."""
    turns = []
    if style.example:
        turns = [
            {"role": "user", "content": style.example.question},
            {"role": "assistant", "content": perfect_completion(style.example, style.task)},
        ]
    turns.append({"role": "user", "content": question})
    if style.system_role:
        return [{"role": "system", "content": style.system_prompt}, *turns]
    turns[0]["content"] = f"{style.system_prompt}\n\n{turns[0]['content']}"
    return turns


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], to_continue: bool = True
) -> str:
    """Return the text that the model continues, or the conversation as it stands."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=to_continue, tokenize=False, **TEMPLATE_SETTINGS
    )


def fit_style(tokenizer: "PreTrainedTokenizerBase", style: PromptStyle = PLAIN) -> PromptStyle:
    """Return the style as the tokenizer's chat template can render it.

    Raises:
        ValueError: the template cannot render a question; the message says why.
    """
    return replace(style, system_role=has_system_role(tokenizer), prefill=find_prefill(tokenizer))


def has_system_role(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the chat template writes a system turn: some refuse it, some drop it.

    Raises:
        ValueError: the template is broken, or leaves the question out.
    """
    question = QUESTION_PROBE["content"]
    text = try_to_render(tokenizer, [SYSTEM_PROBE, QUESTION_PROBE])
    if SYSTEM_PROBE["content"] in text and question in text:
        return True
    try:
        if question in render(tokenizer, [QUESTION_PROBE], to_continue=False):
            return False
        reason = "it leaves the question out"
    except (TemplateError, TypeError) as error:
        line = getattr(error, "lineno", None)
        reason = f"{error}, line {line}" if line else str(error)
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path} cannot be used ({reason}): mend its "
        "chat_template.jinja, or use a model whose template works"
    )


def find_prefill(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text with which the chat template begins each answer itself.

    That is what the generation prompt adds to the header of an assistant turn that was answered
    earlier, as a decoded completion would show it. A block that is closed already is no part of it.
    """
    question, answer = QUESTION_PROBE["content"], ANSWER_PROBE["content"]
    prompt = try_to_render(tokenizer, [QUESTION_PROBE], to_continue=True)
    answered = try_to_render(tokenizer, [QUESTION_PROBE, ANSWER_PROBE, QUESTION_PROBE])
    header, found, _ = answered.partition(question)[2].partition(answer)
    header = CLOSED_BLOCK.sub("", header).rstrip()
    opening = prompt.rpartition(question)[2]
    if not found or not opening.startswith(header):
        return ""
    added = CLOSED_BLOCK.sub("", opening.removeprefix(header))
    for token in tokenizer.all_special_tokens:
        added = added.replace(token, "")
    return added.lstrip()


def find_turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the special token that the chat template writes after an assistant's turn, if any."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    text = try_to_render(tokenizer, [QUESTION_PROBE, ANSWER_PROBE])
    end = text.rpartition(ANSWER_PROBE["content"])[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = tokenizer.encode(end, add_special_tokens=False)
    return next((token for token in tokens if token in special), None)


def try_to_render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], to_continue: bool = False
) -> str:
    """Return the rendered text, nothing where the chat template raises an error."""
    try:
        return render(tokenizer, messages, to_continue)
    except (TemplateError, TypeError):
        return ""


def keep_settings(template: str) -> str:
    """Return a chat template that has `TEMPLATE_SETTINGS` as its defaults, where it knows them, so
    that others who run the model get the prompts of training."""
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
    if not batch:  # on which a tokenizer raises an IndexError
        return []
    return [len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]]
