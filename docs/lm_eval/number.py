"""The strict rule for numbers, stated a second time and in another way than `lora_grpo.answers`.

This is a metric of lm-evaluation-harness and imports nothing of this project, so that a fault in
the project's parser cannot hide in its own check. A text is taken apart from its ends: full stop,
unit, sign and currency; what is left must be a whole number, a decimal or a fraction.
"""

import re
from fractions import Fraction

LONGEST = 100
SIGNS, CURRENCIES = "-+\u2212", "$\u00a3\u20ac"
SEPARATOR = " ?/ ?|[ -]"
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand million billion trillion dozen lakh crore grand half k mil mn mln bn bln tn"
)
FRACTIONS = (
    "halves thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths"
)
SCALES = {*WORDS.split(), *(f"{word}s" for word in WORDS.split()), *FRACTIONS.split()}


def is_whole(text: str) -> bool:
    """Tell whether the text is ASCII digits, commas only where they part thousands."""
    groups = text.split(",")
    if not all(group.isascii() and group.isdigit() for group in groups):
        return False
    grouped = len(groups[0]) <= 3 and groups[0][0] != "0" and {*map(len, groups[1:])} == {3}
    return len(groups) == 1 or grouped


def is_plain_unit(unit: str) -> bool:
    """Tell whether the text, its separator first, is words that leave a number's value alone."""
    words = re.split(SEPARATOR, unit)
    if not all(re.fullmatch("[A-Za-z\u00b0]+[\u00b2\u00b3]?", word) for word in words[1:]):
        return False
    separators = re.findall(SEPARATOR, unit)
    for before, separator, word in zip(words, separators, words[1:], strict=False):
        scales = word.lower() in SCALES or word in ("M", "B", "T")
        if scales and "/" not in separator and before not in ("per", "each", "every"):
            return False
    return True


def split_unit(text: str) -> tuple[str, str]:
    """Return the text up to its first letter, and from there on with the separator before it."""
    letter = re.search("[A-Za-z\u00b0]", text)
    if letter is None:
        return text, ""
    head, unit = text[: letter.start()], text[letter.start() :]
    separator = re.search(f"(?:{SEPARATOR})\\Z", head)
    if separator is None:
        return head, f" {unit}"
    return head[: separator.start()], separator[0] + unit


def split_sign(text: str) -> tuple[bool, str]:
    """Return whether the number is negative, and the text without its sign and currency."""
    sign = text[:1] if text[:1] in SIGNS else ""
    text = text[len(sign) :]
    if text and text[0] in CURRENCIES:
        text = text[1:].removeprefix(" ")
    if not sign and text and text[0] in SIGNS:
        sign, text = text[0], text[1:]
    if text and text[-1] in f"%{CURRENCIES}":
        text = text[:-1].removesuffix(" ")
    return sign in ("-", "\u2212"), text


def read_size(text: str) -> Fraction | None:
    """Return the value of a bare whole number, decimal or fraction, or None."""
    top, slash, bottom = text.partition("/")
    if slash:
        top, bottom = top.removesuffix(" "), bottom.removeprefix(" ")
        readable = is_whole(top) and is_whole(bottom) and "," not in bottom and int(bottom) > 0
        return Fraction(top.replace(",", "")) / int(bottom) if readable else None
    whole, point, digits = text.partition(".")
    if point and not (is_whole(digits) and "," not in digits):
        return None
    if not is_whole(whole) and not (point and whole == ""):
        return None
    return Fraction(f"{whole.replace(',', '') or 0}.{digits or 0}")


def read_number(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number and at most a unit, or None."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    head, unit = split_unit(" ".join(text.split()).removesuffix("."))
    if unit and not is_plain_unit(unit):
        return None
    negative, size = split_sign(head)
    value = read_size(size)
    return -value if negative and value is not None else value


def same_number(references: list[str], predictions: list[str]) -> float:
    """Return 1.0 if the one prediction is the number that the one reference is, else 0.0."""
    gold, answered = read_number(references[0]), read_number(predictions[0])
    return float(gold is not None and gold == answered)
