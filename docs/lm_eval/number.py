r"""The strict rule for numbers, stated again in another way than `lora_grpo.tasks.numbers`.

This is a metric of lm-evaluation-harness and imports nothing of this project, so that a fault in
the project's parser cannot hide in its own check. A text is taken apart from left to right: sign
and currency, then all that can belong to a number, which is judged as a whole, then words.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

LONGEST = 100
# Each unit of measure with its other spellings.
UNITS = """
percent % pct percentage
mm millimeter millimetre 毫米; cm centimeter centimetre 厘米; m meter metre 米
km kilometer kilometre 公里 千米; inch inches; foot feet ft; yard yd; mile mi
mg milligram; g gram 克; kg kilogram kilo 千克 公斤; ton tonne; ounce oz; pound lb £ gbp 英镑
ml milliliter millilitre 毫升; l liter litre 升; cup; pint; quart; gallon gal
tablespoon tbsp; teaspoon tsp
s second sec 秒; minute min 分钟; h hour hr 小时; day 天; week wk 周; month; year yr 年; am; pm
mph; kph kmh kmph; degree deg ° 度; celsius °c; fahrenheit °f; radian rad
dollar $ usd us$ 美元; cent ¢ 美分; euro € eur 欧元; yen jpy 日元 円
yuan cny rmb 元 块 人民币; rupee ₹ rs inr
N newton; J joule; kj kilojoule; W watt; kw kilowatt; kwh; V volt; hz hertz
byte; kb kilobyte; mb megabyte; gb gigabyte
"""
NAMES = {word: unit.split()[0] for unit in re.split("[;\n]", UNITS) for word in unit.split()}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALES |= {"lakh": 5, "crore": 7}  # powers of ten; a dozen is none
NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety half
    halve third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth hundred thousand
    million billion trillion lakh crore dozen grand k mil mn mln bn bln tn factorial
"""
REFUSED = set(NUMBER_WORDS.split())
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
DONE_POWERS = {"squared": 2, "cubed": 3}
CHINESE_NUMERALS = "〇零一二三四五六七八九十百千万亿两半"
DASHES = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
SYMBOLS = "$\u00a2-\u00a5\u20a0-\u20cf"
WORD = f"\u00b0(?: ?[CF](?!\\w))?|[%{SYMBOLS}]|[^\\W\\d_\u0370-\u03ff]+"


class Number(NamedTuple):
    """A value, its unit and what that is per, each with its power; None where nothing is said."""

    value: Fraction
    unit: tuple[str, int] | None
    per: tuple[str, int] | None


def argument(text: str) -> tuple[str, str]:
    """Return the argument that a LaTeX command takes from the start of a text, and what follows."""
    text = text.removeprefix(" ")
    if text.startswith("{"):
        inside, _, after = text[1:].partition("}")
        return inside.strip(" "), after
    return text[:1], text[1:]


def spaced(before: str, middle: str, after: str) -> str:
    """Join three texts without making one number of two."""
    left = " " if before[-1:].isdigit() else ""
    return f"{before}{left}{middle}{' ' if after[:1].isdigit() else ''}{after}"


def undo_latex(text: str) -> str:
    """Return LaTeX as plain text, fractions as `1/2`."""
    for command in ("\\dfrac", "\\tfrac", "\\cfrac"):
        text = text.replace(command, "\\frac")
    pieces = text.split("\\frac")
    text = pieces.pop()
    while pieces:
        top, rest = argument(text)
        bottom, after = argument(rest)
        whole = top.removeprefix("-").replace(",", "").isdigit() and bottom.isdigit()
        whole = whole and (top.isdigit() or "{" in text[:2])
        before = pieces.pop()
        text = spaced(before, f"{top}/{bottom}", after) if whole else f"{before}\\frac{text}"
    for name in ("text", "textbf", "textrm", "mathrm", "mathbf", "mbox", "boxed", "fbox"):
        gap = " " if name in ("boxed", "fbox") else ""
        text = re.sub(rf"\\{name} ?\{{([^{{}}]*)\}}", rf" \1{gap}", text)
    for latex in ("^\\circ", "^{\\circ}", "\\degree"):
        text = text.replace(latex, "\u00b0")
    for latex in ("\\!", "\\left", "\\right"):
        text = text.replace(latex, "")
    text = re.sub(r"\\[,;: ]|(?<=\w)~|\\q?quad", " ", text.replace("{,}", ","))
    text = re.sub(r"\\times|\\cdot|\u00b7", "\u00d7", text)
    text = re.sub(r"\^\{([-+]?[0-9]{1,3})\}", r"^\1", text)
    return re.sub(r"\\([%$#])", r"\1", text)


def undo_typography(text: str) -> str:
    """Return dashes, raised digits and fractions of one character as they are typed."""
    plain, raised, split = "", False, False
    for character in text:
        form = unicodedata.normalize("NFKC", character)
        kind = unicodedata.decomposition(character).partition(" ")[0]
        if kind == "<fraction>":
            plain = spaced(plain, form.replace("\u2044", "/"), "")
        elif kind == "<super>" and (form.isdigit() or form == "\u2212"):
            plain += ("" if raised else "^") + form
        else:
            plain += " " * (split and character.isdigit()) + character
        raised, split = kind == "<super>", kind == "<fraction>"
    return plain.translate({ord(dash): "-" for dash in DASHES} | {0x2019: "'", 0x2044: "/"})


def unwrap(text: str) -> str:
    """Return the text without what only shows where a number begins and ends."""
    for left, right in (("**", "**"), ("`", "`"), ('"', '"'), ("\\(", "\\)"), ("\\[", "\\]")):
        before, opened, rest = text.partition(left)
        inside, closed, after = rest.partition(right)
        if opened and closed and inside:
            text = f"{before} {inside} {after}"
    places = [found.start() for found in re.finditer(r"\\.|\$", text) if found[0] == "$"]
    half = len(places) // 2
    first, last = places[:half], places[half:]
    paired = half in (1, 2) and all(
        len(side) == half and side[-1] - side[0] == half - 1 for side in (first, last)
    )
    if paired and last[0] > first[-1] + 1 and not text[last[-1] + 1 :][:1].isdigit():
        inside = text[first[-1] + 1 : last[0]]
        text = f"{text[: first[0]]} {inside} {text[last[-1] + 1 :]}"
    return text


def is_whole(text: str) -> bool:
    """Return whether the text is ASCII digits, commas only where they part thousands."""
    groups = text.split(",")
    if not all(group.isascii() and group.isdigit() for group in groups):
        return False
    return len(groups) == 1 or (starts_group(groups[0], 3) and {*map(len, groups[1:])} == {3})


def starts_group(group: str, longest: int) -> bool:
    return 0 < len(group) <= longest and group[0] != "0"


def whole_value(text: str) -> int | None:
    """Return a whole number with its thousands parted in any way that leaves one reading."""
    if is_whole(text):
        return int(text.replace(",", ""))
    for separator in " '_":
        groups = text.split(separator)
        if all(map(str.isdigit, groups)) and starts_group(groups[0], 3):
            return int("".join(groups)) if {*map(len, groups[1:])} == {3} else None
    groups = text.split(",")  # 1,00,000
    sizes = [len(group) for group in groups]
    indian = all(map(str.isdigit, groups)) and sizes[-1] == 3 and {*sizes[1:-1]} == {2}
    return int("".join(groups)) if indian and starts_group(groups[0], 2) else None


def size(body: str) -> Fraction | None:
    """Return the value of a bare whole number, decimal, fraction or mixed number, or None."""
    if "/" in body:
        top, _, bottom = body.partition("/")
        top, bottom = top.removesuffix(" "), bottom.removeprefix(" ")
        whole, mixed, top = top.rpartition(" ")
        if not (
            is_whole(top) and bottom.isdigit() and int(bottom) and (not mixed or is_whole(whole))
        ):
            return None
        part = Fraction(int(top.replace(",", "")), int(bottom))
        if mixed and part >= 1:
            return None
        return part + int((whole or "0").replace(",", ""))
    groups, comma, decimals = body.partition(",")
    parts = groups.split(".")
    if comma and decimals.isdigit() and starts_group(parts[0], 3) and {*map(len, parts[1:])} == {3}:
        return Fraction(f"{''.join(parts)}.{decimals}") if all(map(str.isdigit, parts)) else None
    whole, point, decimals = body.partition(".")
    value = whole_value(whole) if whole or not point else 0
    if value is None or (point and not (decimals.isascii() and decimals.isdigit())):
        return None
    return Fraction(f"{value}.{decimals or 0}")


def read(text: str) -> Number | None:
    """Return what a text says that is one number and at most a unit, or None."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    text = " ".join(undo_latex(undo_typography(unwrap(text))).split())
    text = re.sub(r"\A(#{4}|((the )?(final )?answer( is)?:?)|([a-z]+ ?)?=) ?", "", text, flags=re.I)
    text = text[:-1].rstrip() if text and text[-1] in ".,;\u3002" else text
    sign, text = split_off(r"[-+]|minus |negative ", text)
    money, text = split_off(rf"(US)?[{SYMBOLS}] ?|(USD|EUR|GBP|INR|CNY|RMB|JPY|Rs)\.? ", text)
    inner, text = split_off("[-+]", text)
    body, text = split_off(r"[0-9.,'_/ ]*[0-9]", text)
    value = size(body)
    if value is None or (sign and inner) or (text.startswith("^") and body != "10"):
        return None
    power = re.match(r"[eE](?P<e>[-+]?[0-9]{1,3})(?![0-9^])", text) if "/" not in body else None
    power = power or (
        re.match(r"\^(?P<e>[-+]?[0-9]{1,3})(?![0-9^])", text) if body == "10" else None
    )
    if power:
        value = Fraction(10) ** int(power["e"]) * (1 if power[0][0] == "^" else value)
    elif "/" not in body:
        power = re.match(r" ?[x\u00d7*] ?10\^(?P<e>[-+]?[0-9]{1,3})(?![0-9^])", text)
        value *= Fraction(10) ** int(power["e"]) if power else 1
    text = text[power.end() :] if power else text
    if text.startswith("^"):
        return None
    value = -value if (sign or inner) not in ("", "+") else value
    return read_words(value, NAMES.get(money.strip(" .").lower()), text, money != "")


def split_off(pattern: str, text: str) -> tuple[str, str]:
    found = re.match(pattern, text, re.IGNORECASE if "minus" in pattern else 0)
    return (found[0], text[found.end() :]) if found else ("", text)


def measure(word: str, last: bool) -> str | None:
    """Return the unit of measure that a word names, or None."""
    if len(word) == 1 and word.isascii() and word.isalpha():
        return NAMES.get({"L": "l"}.get(word, word))
    word = "inch" if word == "in" and last else word.lower().replace(" ", "")
    return NAMES.get(word, NAMES.get(word.removesuffix("s")))


def read_words(value: Fraction, money: str | None, text: str, paid: bool) -> Number | None:
    """Return the number with what its words say, or None where they change or hide it."""
    text = re.sub(r" ?\(([^()]*)\)$", r" \1", text).rstrip()
    text = re.sub(r"\bper cent\b", "percent", text)
    tokens = [*re.finditer(rf"( ?/ ?|[ -]|)({WORD})(?:\^?([23])(?!\d))?(?:\.(?= |$))?", text)]
    if "".join(token[0] for token in tokens) != text:
        return None
    said = {False: [money and (money, 1)], True: [None]}  # by whether it is what comes per
    per, before, ahead, leading = False, "", 1, True
    for token in tokens:
        gap, word, power = token.groups()
        low, name = word.lower().removesuffix("s"), measure(word, token is tokens[-1])
        if leading and ((gap == " " and low in {*SCALES, "dozen"}) or (gap == "" and word == "k")):
            value *= {"dozen": 12, "k": 1000}.get(low) or 10 ** SCALES[low]
            continue
        leading, [unit], [rate] = False, said[False], said[True]
        opens = word.lower() in ("per", "each", "every") or (unit and word.lower() in ("a", "an"))
        if (
            not opens
            and "/" not in gap
            and low in REFUSED
            and before not in ("per", "each", "every")
        ):
            return None
        per, before = per or bool(opens) or "/" in gap, low
        if opens:
            continue
        cased = word[0].lower() != word[0].upper()
        shortest = 0 if not cased or name else 2 if gap == " " else 4
        if (cased and len(word) == 1 and (gap == "-" or ("/" in gap and not unit))) or (
            len(word) < shortest or (cased and power and not name)
        ):
            return None
        if not cased and not name and set(word) & set(CHINESE_NUMERALS):
            return None
        known = said[per][0] and said[per][0][0] != "a noun"
        if low in DONE_POWERS:
            if not known:
                return None
            said[per] = [(said[per][0][0], DONE_POWERS[low])]
        elif low in POWERS:
            ahead = POWERS[low]
        elif name and not per and paid and known and said[per][0][0] != name:
            return None
        elif name in ("mph", "kph"):
            said = {False: [("mile" if name == "mph" else "km", said[False][0][1] if unit else 1)]}
            said[True] = [("h", rate[1] if rate else 1)]
        elif name and (not known or said[per][0][0] == "degree"):
            said[per] = [(name, int(power or ahead))]
        else:
            said[per] = [said[per][0] or ("a noun", 1)]
    return Number(value, said[False][0], said[True][0])


def same_number(references: list[str], predictions: list[str]) -> float:
    """Return 1.0 if the one prediction is the number that the one reference is, else 0.0."""
    gold, answered = read(references[0]), read(predictions[0])
    if gold is None or answered is None or gold.value != answered.value:
        return 0.0
    units = [(gold.unit, answered.unit), (gold.per, answered.per)]
    return float(all(one is None or other is None or one == other for one, other in units))
