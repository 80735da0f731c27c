"""Multiple choice: the options that a question lists, and which of them an answer names.

An answer names an option by its letter, by its text, or by both where they agree; anything more,
such as two letters or a letter in a sentence, names none.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from lora_grpo.tasks.numbers import same_number
from lora_grpo.tasks.task import Row, Task, between
from lora_grpo.tasks.text import normalise

LETTERS = "ABCDEFGHIJ"
# How questions mark their options, each style by itself: (A) A) A. A: and [A]
STYLES = (r"\({}\)", r"\[{}\]", r"(?<![(\[]){}\)", r"{}\.(?=\s|$)", r"{}:", r"{} \)")
EDGE = r"(?<![\w$\\])"
DECORATION = "*_`\"' \t\n"
WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm)\s*\{([^{}]*)\}")
NAMED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*(?::\s*)?)?"
    r"[(\[]?([A-J])[)\].:]*(?:[\s:.-]+(?P<text>\S.*))?",
    re.IGNORECASE | re.DOTALL,
)
SAID = re.compile(
    r"(?i:answer|option|choice|correct)(?:\s+is)?\s*(?::\s*)?(?:option\s+)?[*(\[]*([A-J])(?![\w'])"
)
ALONE = re.compile(r"\(([A-J])\)|\*\*([A-J])\W*\*\*|(?<![\w'])([B-HJ])(?![\w'])|([AI])\W*\Z")


def find_marks(question: str, style: str, lower: bool) -> list[tuple[int, int]]:
    """Return where the options begin that a question lists in one style: of each mark its first
    and its last position, in the order of the letters; of several lists the last one."""
    letters = LETTERS.lower() if lower else LETTERS
    marks = [
        [found.span() for found in re.finditer(EDGE + style.format(letter), question)]
        for letter in letters
    ]
    for first in reversed(marks[0]):
        chain = [first]
        for spans in marks[1:]:
            following = next((span for span in spans if span[0] >= chain[-1][1]), None)
            if following is None:
                break
            chain.append(following)
        if len(chain) > 1:
            return chain
    return []


@lru_cache(maxsize=4096)
def find_options(question: str) -> dict[str, str]:
    """Return the options that a question lists, by capital letter; none if it lists none."""
    lists = (find_marks(question, style, lower) for lower in (False, True) for style in STYLES)
    marks = next((marks for marks in lists if marks), [])
    options = {}
    for index, (letter, (_, begin)) in enumerate(zip(LETTERS, marks, strict=False)):
        last = index + 1 == len(marks)
        text = question[begin:] if last else question[begin : marks[index + 1][0]]
        text = text.strip().partition("\n")[0] if last else text
        options[letter] = " ".join(text.split()).rstrip(",; ")
    return options


def list_options(texts: Sequence[str]) -> str:
    """Return options as a question lists them, one per line."""
    lines = zip(LETTERS, texts, strict=False)
    return "\n".join(f"{letter}. {' '.join(text.split())}" for letter, text in lines)


def same_option(left: str, right: str) -> bool:
    """Return whether two texts are the same option."""
    return normalise(left) == normalise(right) or same_number(left, right)


def read_choice(answer: str, options: dict[str, str]) -> str | None:
    """Return the letter of the one option that an answer names, or None."""
    bare = WRAPPED.sub(r"\1", answer).strip(DECORATION).strip("$").strip()
    named = NAMED.fullmatch(bare)
    if named and not named["text"]:
        letter = named[1].upper()
        return letter if not options or letter in options else None
    by_text = [letter for letter, text in options.items() if same_option(bare, text)]
    if by_text:
        return by_text[0] if len(by_text) == 1 else None
    if named and same_option(named["text"], options.get(named[1].upper(), "")):
        return named[1].upper()
    return None


def same_choice(answer: str, gold: str, row: Row) -> bool:
    """Return whether an answer names the gold option among those that the row's question lists."""
    options = find_options(row.get("question") or "")
    right = read_choice(gold, options)
    return right is not None and read_choice(answer, options) == right


def last_choice(completion: str) -> str | None:
    """Return what stands in the answer tags, else the last letter that stands for an option."""
    tagged = between(completion, *Task.answer)
    if tagged is not None:
        return tagged
    said = list(SAID.finditer(completion))
    if said:
        return said[-1][1]
    alone: Iterator[re.Match[str]] = ALONE.finditer(completion)
    letters = ["".join(filter(None, found.groups())) for found in alone]
    return letters[-1] if letters else None


CHOICE_TASK = Task(
    name="choice",
    noun="option",
    compare=same_choice,
    can_read=lambda text: read_choice(text, {}) is not None,
    find_last=last_choice,
    instruction="The answer is the letter of one option.",
)
