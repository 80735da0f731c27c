"""The proof of a Modelfile: read back, fed as Ollama feeds it, it gives the model the very text
that the tokenizer's own template gives, stops where the model stops, and decodes as evaluated.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.merge_checks import Check
from lora_grpo.model import declared_end_ids, load_tokenizer
from lora_grpo.ollama_gotemplate import render as render_go
from lora_grpo.ollama_modelfile import (
    GREEDY,
    Command,
    embedded_messages,
    parse_modelfile,
    values_of,
)
from lora_grpo.ollama_template import adds_bos, expected_prompt, probe
from lora_grpo.prompt import Message, PromptStyle, build_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENTS = (
    "12 + 34?",
    "He said \"hi\" and 'bye' \\n",
    "{{ .System }} {{ end }} }} {% if x %} {{",
    "two\n\nlines\n- of\ttext",
    "naïve 数学 😀 العدد",
    "<answer>7</answer> & more",
    'def f():\n    """x"""\n    return 1',
)
EDGES = "\n  edge \n"
QUESTION = "What is 12 + 34?"


def collate(messages: list[Message]) -> dict[str, Any]:
    """Return what Ollama hands a template for a conversation.

    Messages of one role in a row become one; `.System` is every system message.
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if merged and merged[-1]["Role"] == role:
            merged[-1]["Content"] += "\n\n" + content
        else:
            merged.append({"Role": role, "Content": content})
    system = [message["content"] for message in messages if message["role"] == "system"]
    return {"System": "\n\n".join(system), "Messages": merged}


def answer_request(commands: list[Command], request: list[Message]) -> list[Message]:
    """Return the conversation that Ollama's chat makes of a request to a Modelfile's model."""
    system, example = embedded_messages(commands)
    own = request[0]["role"] == "system" or not system
    return [*([] if own else [{"role": "system", "content": system}]), *example, *request]


def conversations(trimmed: frozenset[str]) -> Iterator[list[Message]]:
    """Yield conversations whose texts are hard to carry, each part in each role."""

    def talk(roles: str, contents: tuple[str, ...]) -> list[Message]:
        names = {"s": "system", "u": "user", "a": "assistant"}
        return [
            {"role": names[role], "content": contents[index % len(contents)]}
            for index, role in enumerate(roles)
        ]

    for shift in range(len(CONTENTS)):
        contents = CONTENTS[shift:] + CONTENTS[:shift]
        for roles in ("su", "u", "sua", "suau", "uau"):
            yield talk(roles, contents)
    yield talk("suauauauau", CONTENTS)
    for message in talk("suau", (EDGES,)):
        if message["role"] not in trimmed:
            plain = talk("suau", CONTENTS)
            yield [message if other["role"] == message["role"] else other for other in plain]


def prove_template(
    template: str, tokenizer: "PreTrainedTokenizerBase", talks: list[list[Message]], name: str
) -> Check:
    """Compare a Go template's text with the tokenizer's own for each conversation."""
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    for talk in talks:
        expected = expected_prompt(tokenizer, talk)
        try:
            found = bos + render_go(template, collate(talk))
        except ValueError as error:
            return Check(name, False, f"the template does not render: {error}")
        if found != expected:
            return Check(name, False, describe_difference(found, expected))
    return Check(name, True, f"{len(talks)} conversations render as the tokenizer's own")


def describe_difference(found: str, expected: str) -> str:
    pairs = zip(found, expected, strict=False)
    place = next(
        (index for index, (left, right) in enumerate(pairs) if left != right),
        min(len(found), len(expected)),
    )
    shown = slice(max(place - 10, 0), place + 20)
    return f"writes {found[shown]!r} where the tokenizer writes {expected[shown]!r}"


def prove_modelfile(text: str, merged: Path, style: PromptStyle) -> list[Check]:
    """Read a Modelfile back and hold it against the merged folder that it was made for.

    Raises:
        ValueError: the folder's chat template cannot be said in a Go template at all.
    """
    tokenizer = load_tokenizer(merged)
    try:
        commands = parse_modelfile(text)
    except ValueError as error:
        return [Check("modelfile", False, str(error))]
    files, templates = values_of(commands, "FROM"), values_of(commands, "TEMPLATE")
    if len(files) != 1 or len(templates) != 1:
        detail = f"{len(files)} FROM and {len(templates)} TEMPLATE commands, expected one of each"
        return [Check("modelfile", False, detail)]
    talks = list(conversations(probe(tokenizer).trimmed))
    return [
        Check("modelfile", True, f"{len(commands)} commands for {files[0]}"),
        prove_template(templates[0], tokenizer, talks, "template"),
        prove_trained_prompt(commands, templates[0], tokenizer, style),
        check_stops(values_of(commands, "PARAMETER stop"), merged, tokenizer),
        check_greedy(commands),
    ]


def prove_trained_prompt(
    commands: list[Command],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    style: PromptStyle,
) -> Check:
    """Compare a bare question to the model with the prompt that it was trained on, then the same
    question with a system message of its own."""
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    for request, system in ((own[1:], style.system_prompt), (own, own[0]["content"])):
        expected = expected_prompt(
            tokenizer, build_messages(QUESTION, PromptStyle(system, style.example))
        )
        try:
            found = bos + render_go(template, collate(answer_request(commands, request)))
        except ValueError as error:
            return Check("trained_prompt", False, f"the template does not render: {error}")
        if found != expected:
            return Check("trained_prompt", False, describe_difference(found, expected))
    return Check("trained_prompt", True, "a bare question gives the prompt of training")


def check_stops(found: list[str], merged: Path, tokenizer: "PreTrainedTokenizerBase") -> Check:
    """Hold the stop texts against the ids that end a completion: each one token, none left."""
    expected = sorted(declared_end_ids(merged, tokenizer))
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in found]
    fits = sorted(tokens) == [[index] for index in expected]
    return Check("stops", fits, f"stops on {found}, tokens {tokens}; the model ends on {expected}")


def check_greedy(commands: list[Command]) -> Check:
    found = {name: values_of(commands, f"PARAMETER {name}") for name in GREEDY}
    fits = all(found[name] == [value] for name, value in GREEDY.items())
    return Check("greedy_parameters", fits, f"{found}, evaluated with {GREEDY}")
