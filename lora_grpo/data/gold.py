"""The gold answer in an answer field: after `####`, in `\boxed{}`, or the one number it can be.

The fields of a column go in, since how numbers are written is decided for all of them at once; gold
answers come out, each with the layout it was found in, and a note for what is not as usual.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lora_grpo.data.columns import number_as_text
from lora_grpo.tasks.numbers import NOUN, parse_number, read_quantity
from lora_grpo.tasks.task import Task, between

DecimalSeparator = Literal["auto", "point", "comma"]


BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
PHRASE = re.compile(
    r"(?:answer|result|solution|antwort|respuesta|r\u00e9ponse|\u7b54\u6848)"
    r"(?:\s+(?:is|ist|es|est)\b|\s*[:=\uff1a\u662f])+[ \t]*(?P<rest>[^\n]+)",
    re.IGNORECASE,
)
BOLD = re.compile(r"\*\*(.+?)\*\*|__(.+?)__", re.DOTALL)
DECORATION = "*_` \t\n\"'"
# A number in a number's text, with its separators.
DIGITS = re.compile(r"[0-9](?:[0-9.,]*[0-9])?")
WITH_POINT = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
WITH_COMMA = re.compile(r"(?:[1-9][0-9]{0,2}(?:\.[0-9]{3})+|[0-9]+)(?:,[0-9]+)?")
THOUSANDS_BY_POINT = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:\.[0-9]{3})+(?![0-9.])")
# A sentence: words, no mathematics, and a number that stands alone.
FORMULA = re.compile(r"[\\^=+*{}<>|/]|[0-9][A-Za-z]|[A-Za-z][0-9]|[A-Za-z0-9]-[0-9A-Za-z]")
WORD = re.compile(r"[^\W\d_]{2,}")
SCALE = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|third|quarter|score|lakh|crore)",
    re.IGNORECASE,
)
FEWEST_WORDS = 3
# A column's layout is a sentence with one number in it where half of all fields are read so, and
# most of those that are not read otherwise.
HALF, MOST = 0.5, 0.8
CHOICE = re.compile(r"\(?([A-Ja-j])[).:]?")


@dataclass(frozen=True)
class Gold:
    """A gold answer, where it stood if it had to be guessed, and whether it is a number."""

    answer: str
    guess: str | None = None
    is_number: bool = True


def swap_separators(text: str) -> str | None:
    """Return a number's text with decimal commas in the usual notation, `1.234,5` as `1234.5`, or
    None where it is not such a text."""
    if not all(map(WITH_COMMA.fullmatch, DIGITS.findall(text))):
        return None
    return DIGITS.sub(lambda found: found[0].replace(".", "").replace(",", "."), text)


def by_comma_value(text: str) -> Fraction | None:
    swapped = swap_separators(text)
    return None if swapped is None else parse_number(swapped)


def is_readable(text: str) -> bool:
    """Return whether a text is a number in either notation."""
    return parse_number(text) is not None or by_comma_value(text) is not None


def bare_number(text: str) -> str | None:
    """Return the number that a text is, without decoration: `**5**` is `5`."""
    stripped = text.strip(DECORATION)
    if stripped.startswith("$") and stripped.endswith("$"):
        stripped = stripped.strip("$ ")
    return next(filter(is_readable, (stripped, text.strip())), None)


def short_number(text: str) -> str | None:
    """Return what is a number in a short text, without a label: `Answer: 5` is `5`."""
    labelled = PHRASE.search(text)
    return (labelled and bare_number(labelled["rest"])) or bare_number(text)


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, its inner braces balanced, or of `\boxed 5` the
    number."""
    starts = [found.end() for found in BOXED.finditer(text)]
    if not starts:
        return None
    begin, depth = starts[-1], 0
    if not text.startswith("{", begin):
        return re.match(r"[^\s$]*", text[begin:])[0].rstrip(".,;") or None
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position].strip()
    return None


def after_hashes(text: str) -> str | None:
    """Return the first line after the last `####`, nothing if nothing follows."""
    after = text.rpartition("####")[2].strip()
    return after.partition("\n")[0].strip() if "####" in text else None


def after_phrase(text: str) -> str | None:
    """Return the number that the last line with `the answer is` or the like ends on."""
    found = list(PHRASE.finditer(text))
    return bare_number(found[-1]["rest"].rstrip(" .")) if found else None


def in_bold(text: str) -> str | None:
    """Return the one number in bold type."""
    numbers = {bare_number(first or second or "") for first, second in BOLD.findall(text)} - {None}
    return numbers.pop() if len(numbers) == 1 else None


def only_number(text: str) -> str | None:
    """Return the one number of a sentence."""
    digits = DIGITS.findall(text)
    if len(digits) != 1 or FORMULA.search(text) or SCALE.search(text):
        return None
    if len(WORD.findall(text)) < FEWEST_WORDS:
        return None
    sign = re.search(r"(?<!\S)[-\u2212](?=[0-9])", text)
    return ("-" if sign else "") + digits[0]


GUESSES: dict[str, Callable[[str], str | None]] = {
    "after `the answer is`": after_phrase,
    "in bold type": in_bold,
}
SENTENCE = "the only number of a sentence"


def find_marked(field: str) -> str | None:
    """Return what the last mark of an answer holds, number or not: a line after `####`, a box, or
    `<answer>` tags. A `####` may also head a section that ends on a box."""
    boxes = [found.start() for found in BOXED.finditer(field)]
    marks = [
        (field.rfind("####"), after_hashes),
        (max(boxes, default=-1), last_boxed),
        (field.find(Task.answer[0]), lambda text: between(text, *Task.answer)),
    ]
    for position, find in sorted(marks, key=lambda mark: mark[0], reverse=True):
        text = find(field) if position >= 0 else None
        if text is not None:
            return text
    return None


def find_gold(field: str, sentences: bool = False) -> Gold:
    """Return the gold answer of one field: what the last mark holds, else the field if it is a
    number, else a number that stands out in it, else the field."""
    marked = find_marked(field)
    if marked is not None:
        number = short_number(marked)
        return Gold(marked if number is None else number, is_number=number is not None)
    if bare_number(field) is not None:
        return Gold(short_number(field))
    guesses = {**GUESSES, SENTENCE: only_number} if sentences else GUESSES
    for name, find in guesses.items():
        number = find(field)
        if number is not None:
            return Gold(number, name)
    return Gold(field.strip(), is_number=False)


def extract_gold(field: str) -> str:
    """Return the gold answer of one field; see `find_gold`."""
    return find_gold(field).answer


def find_golds(fields: Sequence[str]) -> tuple[list[Gold], list[str]]:
    """Return the gold answers of a column, and a note for each way in which some were guessed. The
    only number of a sentence counts where most fields are such sentences."""
    golds = [find_gold(field) for field in fields]
    unread = [index for index, gold in enumerate(golds) if not gold.is_number]
    guessed = {index: find_gold(fields[index], sentences=True) for index in unread}
    read = sum(gold.guess == SENTENCE for gold in guessed.values())
    if read >= HALF * len(fields) and read >= MOST * len(unread):
        golds = [guessed.get(index, gold) for index, gold in enumerate(golds)]
    notes = []
    for guess, count in Counter(gold.guess for gold in golds if gold.guess).items():
        index = next(index for index, gold in enumerate(golds) if gold.guess == guess)
        notes.append(
            f"{count} of {len(golds)} gold answers are {guess}, such as {golds[index].answer!r} of "
            f"{fields[index][-60:]!r}"
        )
    return golds, notes


def choose_separator(
    answers: Sequence[str], wanted: DecimalSeparator = "auto"
) -> tuple[DecimalSeparator, list[str]]:
    """Return the decimal separator of a column's gold answers, `point` or `comma`, and a note where
    they can be read in two ways.

    Unless asked for, it is the comma where some gold answers can only be read with it, more than
    could be thousands as in `1,200`, and none can only be read with the point.
    """
    if wanted != "auto":
        return wanted, []
    separated = [answer for answer in answers if re.search("[.,]", answer)]
    by_point = {
        answer
        for answer in separated
        if parse_number(answer) is not None
        and all(map(WITH_POINT.fullmatch, DIGITS.findall(answer)))
    }
    by_comma = {answer for answer in separated if by_comma_value(answer) is not None}
    only_comma = [answer for answer in separated if answer in by_comma - by_point]
    thousands = [answer for answer in separated if answer in by_point and "," in answer]
    if by_point <= by_comma and len(only_comma) > len(thousands):
        differing = (text for text in separated if parse_number(text) != by_comma_value(text))
        return "comma", [describe_separator(text, "comma", "point") for text in differing][:1]
    if by_point <= by_comma and only_comma and thousands:
        return "point", [describe_separator(thousands[0], "point", "comma")]
    dotted = [answer for answer in separated if "." in answer and answer in by_point]
    if dotted and all(THOUSANDS_BY_POINT.search(answer) for answer in dotted):
        return "point", [describe_separator(dotted[0], "point", "comma")]
    return "point", []


def describe_separator(answer: str, separator: str, other: str) -> str:
    values = {
        name: "no number" if number is None else number_as_text(float(number))
        for name, number in (("point", parse_number(answer)), ("comma", by_comma_value(answer)))
    }
    return (
        f"gold answers such as {answer!r} are read with a decimal {separator}, as "
        f"{values[separator]}: --decimal-separator {other} makes it {values[other]}"
    )


def describe_units(answers: Sequence[str]) -> list[str]:
    """Return a note on how the units of gold answers count, if there are any."""
    for answer in answers:
        quantity = read_quantity(answer)
        if quantity and quantity.unit and quantity.unit[0] != NOUN:
            return [
                f"gold answers hold units, such as {answer!r}: the same number without a unit is "
                "paid, with another unit it is not; nothing is converted"
            ]
    return []


def describe_unreadable(answers: Sequence[str]) -> str:
    """Return what gold answers look like where none of them can be paid."""
    if most(answers, is_readable):
        return "are numbers that `correctness` does not pay"
    choices = [CHOICE.fullmatch(answer) for answer in answers]
    if all(choices):
        return f"look like choices ({', '.join(sorted({found[1].upper() for found in choices}))})"
    if most(answers, lambda answer: "\\" in answer or "^" in answer):
        return "look like formulas"
    if most(answers, lambda answer: len(WORD.findall(answer)) > FEWEST_WORDS):
        return "look like free text"
    if most(answers, lambda answer: WORD.search(answer) is not None):
        return "look like words"
    return "are no numbers"


def most(answers: Sequence[str], holds: Callable[[str], bool]) -> bool:
    return 2 * sum(map(holds, answers)) > len(answers)
