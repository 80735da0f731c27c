"""A GGUF file and an Ollama Modelfile: template, stop tokens, system prompt and parameters."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.data.prompt import PromptStyle, build_messages
from lora_grpo.export.config import plain_name
from lora_grpo.export.gguf.files import name_file, write_gguf
from lora_grpo.export.ollama_template import (
    ChatFormat,
    describe_difference,
    expected_prompt,
    find_chat_format,
)
from lora_grpo.export.source import ExportedFormat, Say, Source
from lora_grpo.machine.files import write_text
from lora_grpo.policy.adapter import read_train_config
from lora_grpo.policy.base import declared_end_ids, load_tokenizer, read_config
from lora_grpo.proof.checks import Check
from lora_grpo.proof.reference import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
# What Ollama itself takes on a small card; room for a few turns.
CONVERSATION_TOKENS = 4096
NAMES = ("FROM", "TEMPLATE", "SYSTEM", "MESSAGE", "PARAMETER", "LICENSE")
QUESTION = "What is 12 + 34?"
Command = tuple[str, str]


def build_modelfile(
    merged: Path, gguf_name: str, style: PromptStyle, max_completion_length: int | None
) -> str:
    """Return the Modelfile for a GGUF file that lies beside it.

    Raises:
        ValueError: the chat template, the system prompt or the example cannot be said in it.
    """
    tokenizer = load_tokenizer(merged)
    chat_format = find_chat_format(tokenizer)
    family = chat_format.family
    note = f"{family.name}, as the tokenizer's chat template writes it"
    note += "; that trims white space around a message, Ollama does not." if family.trims else "."
    ends = [
        tokenizer.decode([index], skip_special_tokens=False)
        for index in declared_end_ids(merged, tokenizer)
    ]
    licences = [path.read_text(encoding="utf-8") for path in sorted(merged.glob("LICENSE*"))]
    sections = [
        ("", [("FROM", f"./{gguf_name}")]),
        (note, [("TEMPLATE", chat_format.go_template())]),
        (
            "Used unless a request has a system message of its own.",
            list_messages(chat_format, style),
        ),
        ("What ends a completion.", [("PARAMETER stop", text) for text in ends]),
        (
            "Greedy, as evaluated: Ollama would sample, and may punish repeated numbers.",
            [("PARAMETER temperature", "0"), ("PARAMETER repeat_penalty", "1")],
        ),
        *list_limits(merged, max_completion_length),
        ("", [("LICENSE", keep_printable(text)) for text in licences]),
    ]
    return "\n".join(
        (f"# {note}\n" if note else "") + "".join(map(write_command, commands))
        for note, commands in sections
        if commands
    )


def list_messages(chat_format: ChatFormat, style: PromptStyle) -> list[Command]:
    """Return SYSTEM, and MESSAGE lines for a worked example."""
    commands = []
    for message in build_messages("", replace(style, system_role=True))[:-1]:
        role, content = message["role"], message["content"]
        text = content.strip() if chat_format.family.trims else content
        commands.append(("SYSTEM" if role == "system" else f"MESSAGE {role}", text))
    return commands


def list_limits(merged: Path, max_completion_length: int | None) -> list[tuple[str, list[Command]]]:
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


def write_command(command: Command) -> str:
    """Return one command, in the quotes that its value needs.

    Raises:
        ValueError: Ollama would not read back what was written.
    """
    name, value = command
    plain = value.isprintable() and value == value.strip() != "" and '"' not in value
    text = f"{name} {value}\n" if plain else f'{name} """{value}"""\n'
    try:
        found = parse_modelfile(text)
    except ValueError:
        found = []
    if found != [command]:
        raise ValueError(
            f"{name} cannot be written to an Ollama Modelfile: a line of it ends with three double "
            "quotes, or it holds characters that Ollama drops (control characters, no-break and "
            "zero-width spaces). Export gguf instead, or train with another prompt"
        )
    return text


def keep_printable(text: str) -> str:
    """Return text without the characters that Ollama drops."""
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


def prove_modelfile(text: str, merged: Path, style: PromptStyle) -> list[Check]:
    """Read a Modelfile back and compare it with the merged folder that it was made for.

    Raises:
        ValueError: the folder's chat template is none that is written for Ollama.
    """
    tokenizer = load_tokenizer(merged)
    chat_format = find_chat_format(tokenizer)
    try:
        commands = parse_modelfile(text)
    except ValueError as error:
        return [Check("modelfile", False, str(error))]
    name, template = chat_format.family.name, "".join(values_of(commands, "TEMPLATE"))
    difference = describe_difference(template, chat_format.go_template())
    return [
        Check("modelfile", len(values_of(commands, "FROM")) == 1, f"{len(commands)} commands"),
        Check("template", not difference, difference or f"{name}, as the tokenizer's own writes"),
        check_trained_prompt(commands, chat_format, tokenizer, style),
        check_stops(values_of(commands, "PARAMETER stop"), merged, tokenizer),
    ]


def check_trained_prompt(
    commands: list[Command],
    chat_format: ChatFormat,
    tokenizer: "PreTrainedTokenizerBase",
    style: PromptStyle,
) -> Check:
    """Compare a bare question to the model with the prompt that it was trained on."""
    said = [("system", text) for text in values_of(commands, "SYSTEM")[-1:]]
    said += [(name[8:], text) for name, text in commands if name.startswith("MESSAGE ")]
    messages = [{"role": role, "content": text} for role, text in (*said, ("user", QUESTION))]
    trained = build_messages(QUESTION, replace(style, system_role=True))
    expected = expected_prompt(tokenizer, trained, chat_format.system_role)
    difference = describe_difference(chat_format.render(messages), expected)
    detail = difference or "a bare question gives the prompt of training"
    return Check("trained_prompt", not difference, detail)


def check_stops(found: list[str], merged: Path, tokenizer: "PreTrainedTokenizerBase") -> Check:
    """Compare the stop texts with the ids that end a completion: each one token, none left."""
    expected = sorted(declared_end_ids(merged, tokenizer))
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in found]
    fits = sorted(tokens) == [[index] for index in expected]
    return Check("stops", fits, f"stops on {found}, tokens {tokens}; the model ends on {expected}")


def check_ollama(source: Source, quants: tuple[str, ...]) -> None:
    """Raise a ValueError for a chat template that is not written for Ollama, or several types."""
    if len(quants) > 1:
        raise ValueError(
            f"--format ollama takes one --quant, got {' '.join(quants)}: a Modelfile names one file"
        )
    find_chat_format(load_tokenizer(source.tokenizer_folder))


def write_ollama(
    source: Source, folder: Path, quant: str, reference: Reference, say: Say
) -> ExportedFormat:
    """Write the GGUF file and its Modelfile, and prove both.

    Raises:
        ValueError: a weight does not fit the type, or the system prompt cannot be said.
    """
    written = write_gguf(source, folder, (quant,), reference, say)
    length = source.record.trained.get("max_completion_length")
    text = build_modelfile(source.merged, name_file(source, quant), source.style, length)
    write_text(folder / MODELFILE, text)
    say(f"proving {MODELFILE}")
    text = (folder / MODELFILE).read_text(encoding="utf-8")
    checks = prove_modelfile(text, source.merged, source.style)
    name = plain_name(source.name)
    commands = (("ollama", "create", name, "-f", Path(MODELFILE)), ("ollama", "run", name))
    return ExportedFormat((*written.checks, *checks), written.figures, commands)
