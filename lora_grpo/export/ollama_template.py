"""A tokenizer's chat template as the Go template that Ollama wants.

The tokenizer renders conversations of marker words; what stands around them is what the Go template
writes around `.System` and each message's `.Content`. No Jinja is translated, so that what cannot
be said this way is refused or fails its proof.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_grpo.data.prompt import TEMPLATE_SETTINGS, Message, render
from lora_grpo.export.ollama_gotemplate import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "zqMarker{}qz"
ROLES = {"s": "system", "u": "user", "a": "assistant"}
NEIGHBOURS = "what it writes around a message depends on the messages beside it"
LAST = "eq (len (slice $.Messages $i)) 1"


@dataclass(frozen=True)
class Turns:
    """The texts around each content.

    `system` stands before and after a system prompt up to the first question, and `opening` before
    that question where there is none; `user` stands around a later question, `assistant` around an
    earlier answer, and `generation` where the model goes on. The roles in `trimmed` lose white
    space at the ends of their contents in the tokenizer's template.
    """

    system: tuple[str, str]
    opening: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    trimmed: frozenset[str]


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether tokenizing puts a BOS first, which GGUF records and Ollama then does too."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def render_roles(
    tokenizer: "PreTrainedTokenizerBase", roles: str, generation: bool, padded: str = ""
) -> str:
    """Render marker words; those of the role `padded` with white space around."""
    words = [
        f" \n{MARKER.format(index)}\n " if role == padded else MARKER.format(index)
        for index, role in enumerate(roles)
    ]
    messages: list[Message] = [
        {"role": ROLES[role], "content": word} for role, word in zip(roles, words, strict=True)
    ]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation, tokenize=False, **TEMPLATE_SETTINGS
    )


def cut(text: str, count: int) -> list[str]:
    """Return what stands before, between and after the marker words."""
    pieces = []
    for index in range(count):
        if text.count(MARKER.format(index)) != 1:
            raise ValueError("it does not write each message once and in order")
        before, _, text = text.partition(MARKER.format(index))
        pieces.append(before)
    return [*pieces, text]


def drop_prefix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ValueError(NEIGHBOURS)
    return text.removeprefix(prefix)


def probe(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """Find what a tokenizer's chat template writes around each message.

    Raises:
        ValueError: a Go template cannot say it.
    """
    from jinja2 import TemplateError

    try:
        return probe_turns(tokenizer)
    except (TemplateError, ValueError) as error:
        raise ValueError(
            f"the tokenizer's chat template cannot be said in Ollama's Go templates ({error}): "
            "export gguf instead, whose file carries the template itself"
        ) from error


def probe_turns(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    if "strftime_now" in tokenizer.chat_template:
        raise ValueError("it writes the date of the day")

    def pieces(roles: str, generation: bool = False) -> list[str]:
        return cut(render_roles(tokenizer, roles, generation), len(roles))

    before_system, after_system, after_user = pieces("su")
    after_answer = pieces("sua")[-1]
    middle = pieces("suaua")
    turns = Turns(
        system=(before_system, after_system),
        opening=pieces("u")[0],
        user=(drop_prefix(middle[3], after_answer), after_user),
        assistant=(drop_prefix(pieces("suau")[2], after_user), after_answer),
        generation=drop_prefix(pieces("su", True)[-1], after_user),
        trimmed=frozenset(name for role, name in ROLES.items() if trims(tokenizer, role)),
    )
    between = [turns.user[1] + turns.assistant[0], turns.assistant[1] + turns.user[0]]
    for roles, opening in (("suauau", list(turns.system)), ("uau", [turns.opening])):
        expected = [*opening, *between * roles.count("a"), turns.user[1] + turns.generation]
        if pieces(roles, True) != expected:
            raise ValueError(NEIGHBOURS)
    return without_bos(turns, tokenizer.bos_token) if adds_bos(tokenizer) else turns


def trims(tokenizer: "PreTrainedTokenizerBase", role: str) -> bool:
    plain, padded = (render_roles(tokenizer, "suau", True, chosen) for chosen in ("", role))
    for index, found in enumerate("suau"):
        if found == role:
            plain = plain.replace(MARKER.format(index), f" \n{MARKER.format(index)}\n ")
    return padded != plain


def without_bos(turns: Turns, bos: str) -> Turns:
    """Leave to Ollama the BOS that it writes itself.

    Raises:
        ValueError: the template writes none, so that Ollama's would be one too many.
    """
    if not (turns.system[0].startswith(bos) and turns.opening.startswith(bos)):
        raise ValueError(f"the tokenizer puts {bos} first and the template does not")
    before, after = turns.system
    return replace(
        turns, system=(before.removeprefix(bos), after), opening=turns.opening.removeprefix(bos)
    )


def literal(text: str) -> str:
    """Return text as it stands in a Go template inside a Modelfile: as it is where both keep it."""
    kept = all(character.isprintable() or character == "\n" for character in text)
    return text if kept and "{" not in text and '"""' not in text else f"{{{{ {quote(text)} }}}}"


def build_template(turns: Turns) -> str:
    """Return the Go template, over `.System` and `.Messages`.

    An answer that comes last is left open for the model to go on with, as Ollama's own templates
    do. System messages are written at the top wherever they stand: a request's own would otherwise
    come after the worked example.
    """
    start, user, finish = turns.system[0], turns.user[0], turns.user[1]
    headed = bool(user) and turns.system[1].endswith(user) and turns.opening.endswith(user)
    drop = len(user) if headed else 0
    begun = choose(turns.system[1], turns.opening, start, drop)
    if headed:
        top, before = begun, literal(user)
    else:
        top = "{{ $first := true }}"
        before = (
            "{{ if $first }}"
            + begun
            + "{{ else }}"
            + literal(user)
            + "{{ end }}{{ $first = false }}"
        )
    return (
        top
        + "{{ range $i, $_ := .Messages }}"
        + '{{ if eq .Role "user" }}'
        + f"{before}{{{{ .Content }}}}{literal(finish)}{{{{ end }}}}"
        + f"{{{{ if {LAST} }}}}{literal(turns.generation)}"
        + '{{ if eq .Role "assistant" }}{{ .Content }}{{ end }}'
        + '{{ else if eq .Role "assistant" }}'
        + f"{literal(turns.assistant[0])}{{{{ .Content }}}}{literal(turns.assistant[1])}"
        + "{{ end }}{{ end }}"
    )


def choose(after_system: str, opening: str, before_system: str, drop: int) -> str:
    """Write what opens a conversation, with a system prompt and without, less `drop` characters."""
    after, without = (text[: len(text) - drop] for text in (after_system, opening))
    otherwise = f"{{{{ else }}}}{literal(without)}" if without else ""
    return (
        f"{{{{ if $.System }}}}{literal(before_system)}{{{{ $.System }}}}{literal(after)}"
        f"{otherwise}{{{{ end }}}}"
    )


def expected_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> str:
    """Return what the model continues by the tokenizer's own template, an open answer included."""
    if messages[-1]["role"] == "assistant":
        return render(tokenizer, messages[:-1]) + messages[-1]["content"]
    return render(tokenizer, messages)
