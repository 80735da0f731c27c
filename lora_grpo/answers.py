"""Read a completion: its answer, whether its form is right, and whether two texts are one number.

The parser that pays the reward is the one that evaluates. Time is linear in the completion's
length: tags are counted and cut out as plain strings, and a text that may be a number is refused
above 100 characters before any pattern sees it.
"""

import re
from fractions import Fraction
from itertools import pairwise

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
LONGEST_NUMBER = 100

# `[0-9]` and not `\d`, which takes the digits of every script. The lookahead refuses `1,2345`.
INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}(?![0-9]))+|[0-9]+)"
WORD = "[A-Za-z\u00b0]+[\u00b2\u00b3]?"
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+\u2212]?) (?:[$\u00a3\u20ac][ ]?)? (?P<inner_sign>[-+\u2212]?)
    (?: (?P<top>{INTEGER}) [ ]?/[ ]? (?P<bottom>[0-9]+)
      | (?P<decimal>{INTEGER}(?:\.[0-9]+)? | \.[0-9]+) )
    (?:[ ]?[%$\u00a3\u20ac])?
    (?P<unit>(?:[ ]?/[ ]?|[ -])?{WORD}(?:(?:[ ]?/[ ]?|[ -]){WORD})*)?
    \.?
    """,
    re.VERBOSE,
)
NUMBER_ANYWHERE = re.compile(
    rf"(?:(?<![\w$%)\]])[-\u2212]\$?|(?<!\w)\$[-\u2212])?"
    rf"(?:{INTEGER}(?:\.[0-9]+|/[1-9][0-9]*)?|(?<![\w.])\.[0-9]+)"
)

# After a number these are part of its value, not a unit: `72 million`, `3k`, `2 and a half`.
NUMBER_WORD = re.compile(
    r"""
    (?: zero | one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
      | thirteen | fourteen | fifteen | sixteen | seventeen | eighteen | nineteen | twenty | thirty
      | forty | fifty | sixty | seventy | eighty | ninety | hundred | thousand | million | billion
      | trillion | dozen | lakh | crore | grand | half | k | mil | mn | mln | bn | bln | tn
    ) s?
    | halves | thirds | (?: four | fif | six | seven | eigh | nin | ten | hundred | thousand ) ths
    """,
    re.VERBOSE | re.IGNORECASE,
)
SCALE_LETTERS = ("M", "B", "T")


def parse_answer(completion: str) -> str | None:
    """Return the stripped text between the answer tags, or None.

    There must be exactly one `<answer>` and one `</answer>`, in order: two answers are no hedge.
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    inside, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    return inside.strip() if closed else None


def has_format(completion: str) -> bool:
    """Tell whether the completion is one reasoning block and one answer block, neither blank.

    White space around the blocks is free; any other text there, or a tag too many, is not.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):
        return False
    pieces, rest = [], completion
    for tag in TAGS:
        piece, found, rest = rest.partition(tag)
        if not found:
            return False
        pieces.append(piece.strip())
    before, reasoning, between, answer = pieces
    return bool(reasoning and answer) and not (before or between or rest.strip())


def changes_value(unit: str) -> bool:
    words = unit.replace("/", " per ").replace("-", " ").split()
    return any(
        before not in ("per", "each", "every")
        and (word in SCALE_LETTERS or NUMBER_WORD.fullmatch(word) is not None)
        for before, word in pairwise(["", *words])
    )


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number and at most a unit, or None.

    Currency, per cent and unit leave the value alone (`$50`, `50%` and `50 clips per day` are 50).
    A scale word does not, so `50 million` is no number; nor is a text with two numbers in it.
    """
    stripped = text.strip()
    if len(stripped) > LONGEST_NUMBER:
        return None
    found = NUMBER.fullmatch(" ".join(stripped.split()))
    if (
        found is None
        or (found["sign"] and found["inner_sign"])
        or changes_value(found["unit"] or "")
    ):
        return None
    if found["bottom"] is not None and int(found["bottom"]) == 0:
        return None
    value = Fraction((found["decimal"] or found["top"]).replace(",", "")) / int(
        found["bottom"] or 1
    )
    return value if (found["sign"] or found["inner_sign"]) in ("", "+") else -value


def same_number(left: str, right: str) -> bool:
    """Tell whether both texts are numbers (see `parse_number`) and exactly equal; never raises."""
    number = parse_number(left)
    return number is not None and number == parse_number(right)


def last_number(completion: str) -> str | None:
    """Return the last number anywhere in the completion, tags or not, or None.

    A minus directly after a digit or a word is an operator (`5-3` ends on `3`), else a sign.
    """
    last = None
    for found in NUMBER_ANYWHERE.finditer(completion):
        if len(found[0]) <= LONGEST_NUMBER:
            last = found[0]
    return last
