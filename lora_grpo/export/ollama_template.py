"""The chat template of a Modelfile: Ollama takes Go templates, a tokenizer brings Jinja.

Each family of chat templates is one row of data, from which come the Go template and a renderer
that writes the same. A row is used only where the renderer writes what the tokenizer's own template
writes, for every conversation of a list of difficult ones.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_grpo.data.prompt import Message, has_system_role, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, SYSTEM = "questionprobe", "systemprobe"
IS_LAST = "eq (len (slice $.Messages $i)) 1"
ROLES = {"s": "system", "u": "user", "a": "assistant"}
CONTENTS = (
    "12 + 34?",
    "He said \"hi\" and 'bye' \\n",
    "{{ .System }} {{ end }} }} {% if x %} {{",
    "two\n\nlines\n- of\ttext",
    "naïve 数学 😀 العدد",
    "<answer>7</answer> & more",
    'def f():\n    """x"""\n    return 1',
)
WITH_EDGES = "\n  edge \n"


@dataclass(frozen=True)
class Family:
    """How a family of chat templates writes a turn: the role in `start`, the content, `end`."""

    name: str
    start: str
    end: str
    trims: bool = False

    def turn(self, role: str, content: str) -> str:
        return self.start.format(role=role) + content + self.end


FAMILIES = (
    Family("ChatML", "<|im_start|>{role}\n", "<|im_end|>\n"),
    Family("Llama 3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", trims=True),
)


@dataclass(frozen=True)
class ChatFormat:
    """A family, and what one tokenizer's template adds to it.

    `bos` is what Ollama writes itself. `before_system` stands before a system prompt, `opening`
    before the first question where there is none, `generation` before the answer. Without a system
    role, the system prompt opens the first question, as in training.
    """

    family: Family
    bos: str
    before_system: str
    opening: str
    generation: str
    system_role: bool

    def render(self, messages: list[Message]) -> str:
        """Return the prompt that Ollama makes of a conversation, an unfinished answer included."""
        turns = [message for message in messages if message["role"] != "system"]
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        text = self.bos + self.opening
        if system and self.system_role:
            text = self.bos + self.before_system + system + self.family.end
        unfinished = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
        for message in turns:
            folded = f"{system}\n\n" if system and not self.system_role else ""
            is_first = message is turns[0]
            text += self.family.turn(message["role"], folded * is_first + message["content"])
        return text + self.generation + unfinished

    def go_template(self) -> str:
        """Return the Go template, over `.System` and `.Messages`.

        An answer that comes last is left open for the model to continue, as in Ollama's own
        templates. System messages are written at the top wherever they stand: a request's own would
        otherwise come after the worked example.
        """
        start, end = self.family.start, literal(self.family.end)
        opening, folded = literal(self.opening), ""
        if self.system_role:
            otherwise = "{{ else }}" + opening if opening else ""
            before = literal(self.before_system)
            top = "{{ if $.System }}" + before + "{{ $.System }}" + end + otherwise + "{{ end }}"
        else:
            top = opening + "{{ $first := true }}"
            folded = "{{ if $first }}{{ if $.System }}{{ $.System }}\n\n{{ end }}{{ end }}"
            folded += "{{ $first = false }}"
        return (
            top
            + "{{ range $i, $_ := .Messages }}"
            + '{{ if eq .Role "user" }}'
            + f"{start.format(role='user')}{folded}{{{{ .Content }}}}{end}{{{{ end }}}}"
            + f"{{{{ if {IS_LAST} }}}}{literal(self.generation)}"
            + '{{ if eq .Role "assistant" }}{{ .Content }}{{ end }}'
            + '{{ else if eq .Role "assistant" }}'
            + f"{start.format(role='assistant')}{{{{ .Content }}}}{end}"
            + "{{ end }}{{ end }}"
        )


def literal(text: str) -> str:
    """Return text that stands for itself in a Go template."""
    if "{" in text:
        raise ValueError(f"it writes {text!r}, and braces mean something else to Ollama")
    return text


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether tokenizing puts a BOS first, which GGUF records and Ollama then does too."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def find_chat_format(tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    """Return the row that writes what the tokenizer's chat template writes.

    Raises:
        ValueError: no row does; the message says why, and what to do instead.
    """
    from jinja2 import TemplateError

    reasons = []
    for family in FAMILIES:
        try:
            found = fit_family(family, tokenizer)
            found.go_template()
            check_format(found, tokenizer)
        except (TemplateError, ValueError) as error:
            reasons.append(f"{family.name}: {error}")
            continue
        return found
    raise ValueError(
        "--format ollama knows the chat templates of "
        f"{', '.join(family.name for family in FAMILIES)}; the tokenizer's own is another "
        f"({'; '.join(reasons)}): use --format gguf, whose file holds the template itself"
    )


def fit_family(family: Family, tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    if "strftime_now" in tokenizer.chat_template:
        raise ValueError("it writes today's date")
    question = {"role": "user", "content": QUESTION}
    text = render(tokenizer, [question])
    opening, found, generation = text.partition(family.turn("user", QUESTION))
    if not found:
        raise ValueError(f"it writes a question as {text[-60:]!r}")
    before, system_role = opening, has_system_role(tokenizer)
    if system_role:
        asked = render(tokenizer, [{"role": "system", "content": SYSTEM}, question])
        before = asked.partition(SYSTEM)[0]
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    if not (before.startswith(bos) and opening.startswith(bos)):
        raise ValueError(f"the tokenizer puts {bos} first and the template does not")
    return ChatFormat(
        family,
        bos,
        before.removeprefix(bos),
        opening.removeprefix(bos),
        generation,
        system_role,
    )


def conversations(trims: bool) -> Iterator[list[Message]]:
    """Yield conversations whose texts are hard to carry, each text in each role.

    White space at the ends of a text is left out where the template trims it: Ollama does not.
    """

    def talk(roles: str, shift: int = 0) -> list[Message]:
        contents = itertools.islice(itertools.cycle(CONTENTS), shift, None)
        return [
            {"role": ROLES[role], "content": text}
            for role, text in zip(roles, contents, strict=False)
        ]

    for shift in range(len(CONTENTS)):
        for roles in ("su", "u", "sua", "suau", "uau"):
            yield talk(roles, shift)
    yield talk("suauauauau")
    if not trims:
        plain = talk("suau")
        for role in ROLES.values():
            yield [m | {"content": WITH_EDGES} if m["role"] == role else m for m in plain]


def expected_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], system_role: bool
) -> str:
    """Return what the model continues by the tokenizer's own template, an unfinished answer
    included."""
    if messages[-1]["role"] == "assistant":
        return expected_prompt(tokenizer, messages[:-1], system_role) + messages[-1]["content"]
    if messages[0]["role"] == "system" and not system_role:
        system, first, *rest = messages
        folded = f"{system['content']}\n\n{first['content']}"
        messages = [first | {"content": folded}, *rest]
    return render(tokenizer, messages)


def check_format(chat_format: ChatFormat, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a ValueError for the first conversation of which the renderer writes something else
    than the tokenizer; the message shows where."""
    for talk in conversations(chat_format.family.trims):
        expected = expected_prompt(tokenizer, talk, chat_format.system_role)
        if difference := describe_difference(chat_format.render(talk), expected):
            raise ValueError(difference)


def describe_difference(found: str, expected: str) -> str:
    """Return where two texts part, or nothing where they are the same."""
    if found == expected:
        return ""
    place = 0
    while found[: place + 1] == expected[: place + 1]:
        place += 1
    shown = slice(max(place - 10, 0), place + 20)
    return f"{found[shown]!r} where the tokenizer writes {expected[shown]!r}"
