"""Ollama's Modelfile: written from a merged folder and what the run was trained with, and read
back as Ollama reads it.

The format is at https://docs.ollama.com/modelfile.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.adapter import read_train_config
from lora_grpo.model import declared_end_ids, load_tokenizer, read_config
from lora_grpo.ollama_template import Turns, build_template, probe
from lora_grpo.prompt import Message, PromptStyle, build_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Ollama itself takes on a small card; room for a few turns.
CONVERSATION_TOKENS = 4096
NAMES = ("FROM", "TEMPLATE", "SYSTEM", "MESSAGE", "PARAMETER", "LICENSE")
GREEDY = {"temperature": "0", "repeat_penalty": "1"}
Command = tuple[str, str]


def build_modelfile(
    merged: Path, gguf_name: str, style: PromptStyle, max_completion_length: int | None
) -> str:
    """Return the Modelfile for a GGUF file that lies beside it.

    Raises:
        ValueError: the chat template, the system prompt or the example cannot be said in it.
    """
    tokenizer = load_tokenizer(merged)
    turns = probe(tokenizer)
    sections = [
        ("", [("FROM", f"./{gguf_name}")]),
        (describe_template(turns), [("TEMPLATE", build_template(turns))]),
        (
            "Used unless a request has a system message of its own.",
            write_prompt(turns, style),
        ),
        (
            "What ends a completion.",
            [("PARAMETER stop", text) for text in end_texts(merged, tokenizer)],
        ),
        (
            "Greedy, as evaluated: Ollama would sample, and may punish repeated numbers.",
            [(f"PARAMETER {name}", value) for name, value in GREEDY.items()],
        ),
        *write_limits(merged, max_completion_length),
        ("", [("LICENSE", text) for text in read_licences(merged)]),
    ]
    return "\n".join(write_section(note, commands) for note, commands in sections if commands)


def describe_template(turns: Turns) -> str:
    if not turns.trimmed:
        return "Writes what the tokenizer's chat template writes."
    return (
        "Writes what the tokenizer's chat template writes, which trims white space around a "
        "message; Ollama does not."
    )


def write_prompt(turns: Turns, style: PromptStyle) -> list[Command]:
    """Return SYSTEM, and MESSAGE lines for a worked example."""
    commands = []
    for message in build_messages("", style)[:-1]:
        role, content = message["role"], message["content"]
        text = content.strip() if role in turns.trimmed else content
        commands.append(("SYSTEM" if role == "system" else f"MESSAGE {role}", text))
    return commands


def end_texts(merged: Path, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the text of every token that ends a completion, the end of a turn first."""
    ids = declared_end_ids(merged, tokenizer)
    return [tokenizer.decode([index], skip_special_tokens=False) for index in ids]


def write_limits(
    merged: Path, max_completion_length: int | None
) -> list[tuple[str, list[Command]]]:
    positions = read_config(merged).get_text_config().max_position_embeddings
    trained = read_train_config(merged).get("max_prompt_length", 0) + (max_completion_length or 0)
    room = min(positions, max(CONVERSATION_TOKENS, trained))
    limits = [
        (
            f"A conversation has room for {room} tokens: at least a training prompt and its "
            f"completion, at most the model's {positions} positions.",
            [("PARAMETER num_ctx", str(room))],
        )
    ]
    if max_completion_length is not None:
        note = f"Trained on completions of up to {max_completion_length} tokens."
        limits.append((note, [("PARAMETER num_predict", str(max_completion_length))]))
    return limits


def read_licences(merged: Path) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(merged.glob("LICENSE*"))]
    return [keep_printable(text) for text in texts]


def write_section(note: str, commands: list[Command]) -> str:
    lines = [f"# {note}\n"] if note else []
    return "".join([*lines, *(write_command(name, value) for name, value in commands)])


def write_command(name: str, value: str) -> str:
    """Return one command, in the quotes that its value needs.

    Raises:
        ValueError: Ollama would not read back what was written.
    """
    plain = value.isprintable() and value == value.strip() != "" and '"' not in value
    text = f"{name} {value}\n" if plain else f'{name} """{value}"""\n'
    if not reads_back(text, (name, value)):
        raise ValueError(
            f"{name} cannot be written to an Ollama Modelfile: a line of it ends with three double "
            "quotes, or it holds characters that Ollama drops (control characters, no-break and "
            "zero-width spaces). Export gguf instead, or train with another prompt"
        )
    return text


def reads_back(text: str, command: Command) -> bool:
    try:
        return parse_modelfile(text) == [command]
    except ValueError:
        return False


def keep_printable(text: str) -> str:
    """Return text less the characters that Ollama drops."""
    return "".join(
        character for character in text if character.isprintable() or character in "\t\r\n"
    )


def unquote(text: str) -> str | None:
    """Return a value without its quotes, or None while they are open."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text


def parse_modelfile(text: str) -> list[Command]:
    """Return a Modelfile's commands, read as Ollama does.

    A value ends with the first line at whose end its quotes are closed, and loses the characters
    that are not printable. A parameter's or a message's name is in the command's.

    Raises:
        ValueError: it is no Modelfile.
    """
    commands, lines = [], keep_printable(text).splitlines(keepends=True)
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = line.lstrip("\t ").partition(" ")
        if name not in NAMES:
            raise ValueError(f"{name!r} is no command of a Modelfile")
        if name in ("PARAMETER", "MESSAGE"):
            word, _, value = value.partition(" ")
            name = f"{name} {word}"
        while (found := unquote(value.strip())) is None:
            if not lines:
                raise ValueError(f"the quotes after {name} are not closed")
            value += lines.pop(0)
        commands.append((name, found))
    return commands


def values_of(commands: list[Command], name: str) -> list[str]:
    return [value for found, value in commands if found == name]


def embedded_messages(commands: list[Command]) -> tuple[str, list[Message]]:
    """Return the system prompt and the example's messages of a Modelfile."""
    messages = [
        {"role": name.removeprefix("MESSAGE "), "content": value}
        for name, value in commands
        if name.startswith("MESSAGE ")
    ]
    return "".join(values_of(commands, "SYSTEM")[-1:]), messages
