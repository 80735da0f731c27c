"""Read a completion: its answer, whether its form is right, and whether two texts are one number.

The parser that pays the reward is the one that evaluates. Time is linear in the completion's
length: tags are counted and cut out as plain strings, and a text that may be a number is refused
above 100 characters before any pattern sees it.
"""

import re
from fractions import Fraction

from lora_grpo.data.numbers import LONGEST_NUMBER, POWER_OF_TEN, WHOLE, read_quantity, to_plain

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# In plain text: an exponent (`x^2`, `cm2`) is passed over, and a minus directly after a digit or a
# word is an operator.
ANYWHERE = re.compile(
    rf"""
    (?=[-^$.0-9cfikmy])  # for speed
    (?: (?P<number>
          (?: (?<![\w$%)\]])-\$?(?=[.0-9]) | (?<!\w)\$-(?=[.0-9]) )?
          (?: (?:{WHOLE}[ ])? (?P<fraction>{WHOLE}/0*[1-9][0-9]*)
            | {POWER_OF_TEN}
            | (?: {WHOLE}(?:\.[0-9]+)? | (?<![\w.])\.[0-9]+ )
              (?: [eE][-+]?[0-9]{{1,3}}(?!\w|\.[0-9]) | [ ]?\u00d7[ ]?{POWER_OF_TEN} )?
          )
        )
      | \^[-+]?[0-9]+
      | (?<![A-Za-z]) (?: [mck]?m | in | ft | yd | mi ) [23] (?![0-9])
    )
    """,
    re.VERBOSE,
)


def parse_answer(completion: str) -> str | None:
    """Return the stripped text between the answer tags, or None.

    There must be exactly one `<answer>` and one `</answer>`, in order: two answers are no hedge.
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    inside, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    return inside.strip() if closed else None


def has_format(completion: str) -> bool:
    """Return whether the completion is one reasoning block and one answer block, neither blank.

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


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number and at most a unit, or None.

    Currency, per cent and unit leave the value alone (`$50`, `50%` and `50 clips per day` are 50).
    """
    quantity = read_quantity(text)
    return None if quantity is None else quantity.value


def same_number(left: str, right: str) -> bool:
    """Return whether both texts are one number each, exactly equal, with no two different units.

    Never raises. A unit that one text leaves out is free; nothing is converted, so `50%` is 50 and
    not 0.5, and `2 hours` are not `120 minutes`.
    """
    quantity, other = read_quantity(left), read_quantity(right)
    return quantity is not None and other is not None and quantity.agrees(other)


def last_number(completion: str) -> str | None:
    """Return the last number anywhere in the completion, tags or not, in plain text, or None.

    A minus directly after a digit or a word is an operator (`5-3` ends on `3`), else a sign.
    """
    last = None
    for found in ANYWHERE.finditer(to_plain(completion)):
        if found["number"] and len(found["number"]) <= LONGEST_NUMBER:
            last = found
    if last is None:
        return None
    return last["number"] if parse_number(last["number"]) is not None else last["fraction"]
