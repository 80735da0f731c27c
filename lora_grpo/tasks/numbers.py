"""Read a text that is one number, as people and data sets write it, with at most a unit.

A short text goes in; a `Quantity` (exact value, unit) comes out, or None for anything else: a text
with two numbers, an algebraic term, a word. LaTeX, currency, thousands and units are formatting.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST_NUMBER = 100
NOUN = "a noun"  # the unit of `5 apples`: any word that measures nothing

# Each unit of measure with its other spellings; a plural `s` is free. Two that are parted by
# `;` or a line are never equal, not even `100 cm` and `1 m`: nothing is converted.
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
CANONICAL = {word: unit.split()[0] for unit in re.split("[;\n]", UNITS) for word in unit.split()}
SPEEDS = {"mph": ("mile", "h"), "kph": ("km", "h")}
SQUARES, SQUARED = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}, {"squared": 2, "cubed": 3}
PER = {"per", "each", "every", "a", "an"}

# Exact factors that may follow a number. Others that would change it, such as `bn` or `half`, and
# a number in words further on (`72 or seventy-three`), leave no number to read.
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALES |= {"trillion": 10**12, "dozen": 12, "lakh": 10**5, "crore": 10**7}
WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety half
    halve third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth grand k mil mn
    mln bn bln tn factorial
"""
NUMBER_WORDS = {*WORDS.split(), *SCALES}
NUMERALS = frozenset("〇零一二三四五六七八九十百千万亿两半")

# `[0-9]` and not `\d`, which takes the digits of every script. The lookahead refuses `1,2345`.
WHOLE = "(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
OTHER_THOUSANDS = (
    "[1-9][0-9]{0,2}(?:(?:[ ][0-9]{3})+|(?:'[0-9]{3})+|(?:_[0-9]{3})+)(?![0-9])"
    "|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?![0-9])"
)
POWER_OF_TEN = r"10\^[-+]?[0-9]{1,3}"
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]|(?:minus|negative)[ ])?
    (?P<currency>(?:US)?[$\u00a2-\u00a5\u20a0-\u20cf][ ]?|(?:USD|EUR|GBP|INR|CNY|RMB|JPY|Rs)\.?[ ])?
    (?P<inner_sign>[-+])?
    (?: (?P<european>[1-9][0-9]{{0,2}}(?:\.[0-9]{{3}})+,[0-9]+)
      | (?:(?P<mixed>{WHOLE})[ ])? (?P<top>{WHOLE})[ ]?/[ ]?(?P<bottom>[0-9]+)
      | (?P<power>{POWER_OF_TEN})
      | (?P<decimal>(?:{OTHER_THOUSANDS}|{WHOLE})(?:\.[0-9]+)?|\.[0-9]+)
        (?: [eE](?P<exponent>[-+]?[0-9]{{1,3}}) | [ ]?[x\u00d7*][ ]?(?P<times>{POWER_OF_TEN}) )?
    )
    (?![0-9^])
    """,
    re.VERBOSE,
)
# A letter of any script except Greek, whose letters stand for numbers (`2π`).
LETTERS = "[^\\W\\d_\u0370-\u03ff]+"
UNIT_WORD = re.compile(
    rf"(?P<between>[ ]?/[ ]?|[ -]|)"
    rf"(?P<word>\u00b0(?:[ ]?[CF](?!\w))?|[%$\u00a2-\u00a5\u20a0-\u20cf]|{LETTERS})"
    rf"(?:\^?(?P<power>[23])(?!\d))?(?:\.(?=[ ]|$))?"
)
LEAD_IN = re.compile(
    r"\A(?:\#{4}|(?:the[ ])?(?:final[ ])?answer(?:[ ]is)?:?|(?:[a-z]+[ ]?)?=)[ ]?",
    re.IGNORECASE | re.VERBOSE,
)
WRAPPED = re.compile(
    r"""
    \*\*([^*]+)\*\* | `([^`]+)` | "([^"]+)" | \u201c([^\u201d]+)\u201d
    | \\\((.+)\\\) | \\\[(.+)\\\]
    """,
    re.VERBOSE,
)
# `$72$` or `$$72$$`, where those are all the dollar signs there are.
MATHS = re.compile(
    r"\A((?:[^$\\]|\\.)*)(\$\$?)((?:[^$\\]|\\.)+)\2((?!\$|[0-9])(?:[^$\\]|\\.)*)\Z", re.DOTALL
)

# LaTeX and typography that mean the same as plain text, in the order in which they are undone.
FRAC = re.compile(r"\\[dtc]?frac ?(?:\{ ?(-?[0-9,]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))")
VULGAR_FRACTIONS = {
    chr(code): unicodedata.normalize("NFKC", chr(code)).replace("\u2044", "/")
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}
VULGAR = re.compile(f"[{''.join(VULGAR_FRACTIONS)}]")
SUPERSCRIPT = re.compile("\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
REWRITES = [
    (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox) ?\{ ?([^{}]*)\}"), r" \1"),
    (re.compile(r"\\(?:boxed|fbox) ?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree(?![a-z])"), "\u00b0"),
    (re.compile(r"\\!|\\left(?![a-z])|\\right(?![a-z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]|(?<=\w)~|\\q?quad(?![a-z])"), " "),
    (re.compile(r"\\(?:times|cdot)(?![a-z])|\u00b7"), "\u00d7"),
    (re.compile(r"\^\{ ?([-+]?[0-9]{1,3}) ?\}"), r"^\1"),
    (re.compile(r"\\([%$#])"), r"\1"),
]
DASHES = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"), "-")
TYPOGRAPHY = str.maketrans(DASHES | {ord("\u2044"): "/", ord("\u2019"): "'"})

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


@dataclass(frozen=True)
class Quantity:
    """An exact value with the unit that was written, and what it was written to be `per`, if any.

    A unit is the first spelling of its line in `UNITS` with its power, or NOUN.
    """

    value: Fraction
    unit: tuple[str, int] | None = None
    per: tuple[str, int] | None = None

    def agrees(self, other: "Quantity") -> bool:
        """Return whether both have one value, and one unit where both wrote one."""
        pairs = [(self.unit, other.unit), (self.per, other.per)]
        return self.value == other.value and all(
            left is None or right is None or left == right for left, right in pairs
        )


def to_plain(text: str) -> str:
    r"""Return the text with LaTeX and typographic characters written as in plain ASCII.

    `3\frac{1}{2}` and `3½` become `3 1/2`, `16\text{ cm}²` becomes `16 cm^2`; what is not known
    stays as it is. Linear in the text's length.
    """
    if not text.isascii():
        text = VULGAR.sub(plain_fraction, text.translate(TYPOGRAPHY))
        text = SUPERSCRIPT.sub(plain_power, text)
    if "\\" in text or "{" in text or "~" in text:
        text = FRAC.sub(plain_fraction, text)
        for pattern, replacement in REWRITES:
            text = pattern.sub(replacement, text)
    return text


def plain_power(found: re.Match[str]) -> str:
    return "^" + unicodedata.normalize("NFKC", found[0]).translate(TYPOGRAPHY)


def plain_fraction(found: re.Match[str]) -> str:
    """Return a fraction as `1/2`, kept apart from a digit on either side."""
    if found.re is FRAC:
        written = f"{found[1] or found[2]}/{found[3] or found[4]}"
    else:
        written = VULGAR_FRACTIONS[found[0]]
    text, start, end = found.string, found.start(), found.end()
    before = " " if text[max(start - 1, 0) : start].isdigit() else ""
    after = " " if text[end : end + 1].isdigit() else ""
    return f"{before}{written}{after}"


def read_quantity(text: str) -> Quantity | None:
    """Return what a text says that is one number and at most a unit, or None; never raises."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    text = MATHS.sub(r"\1 \3 \4", WRAPPED.sub(unwrap, text))
    text = " ".join(to_plain(text).split())
    text = LEAD_IN.sub("", text, count=1)
    if text[-1:] in tuple(".,;\u3002"):
        text = text[:-1].rstrip()
    found = NUMBER.match(text)
    value = read_value(found) if found else None
    if value is None:
        return None
    rest = re.sub(r" ?\(([^()]*)\)$", r" \1", text[found.end() :]).rstrip()
    return read_unit(value, (found["currency"] or "").strip(" ."), rest)


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


def unwrap(found: re.Match[str]) -> str:
    return f" {found[found.lastindex]} "


def read_value(found: re.Match[str]) -> Fraction | None:
    """Return the exact value of a number that was found, or None for `1/0`, `--1` and `2 3/2`."""
    signs = [sign for sign in (found["sign"], found["inner_sign"]) if sign]
    if len(signs) > 1:
        return None
    if found["bottom"] is not None:
        top, bottom = int(found["top"].replace(",", "")), int(found["bottom"])
        if bottom == 0 or (found["mixed"] and top >= bottom):
            return None
        value = Fraction(top, bottom) + int((found["mixed"] or "0").replace(",", ""))
    elif found["european"]:
        value = Fraction(found["european"].replace(".", "").replace(",", "."))
    else:
        power = found["power"] or found["times"]
        exponent = int(found["exponent"] or (power[3:] if power else 0))
        value = Fraction(re.sub("[ ,'_]", "", found["decimal"] or "1")) * Fraction(10) ** exponent
    return value if not signs or signs[0] == "+" else -value


def read_unit(value: Fraction, currency: str, rest: str) -> Quantity | None:
    """Return the quantity with what is written after its number, or None where that is no unit."""
    names = {"unit": CANONICAL.get(currency.lower()), "per": None}
    powers, part, before, square, start = {"unit": 1, "per": 1}, "unit", "", 1, 0
    rest = re.sub(r"\bper cent\b", "percent", rest)
    while (found := UNIT_WORD.match(rest, start)) and (factor := find_scale(found)):
        value, start = value * factor, found.end()
    while start < len(rest):
        found = UNIT_WORD.match(rest, start)
        if found is None:
            return None
        between, word, start = found["between"], found["word"], found.end()
        plain, known = word.lower().removesuffix("s"), find_unit(word, last=start == len(rest))
        is_per = word.lower() in PER and (names["unit"] or word.lower() not in ("a", "an"))
        if "/" in between or is_per:
            part = "per"
        elif plain in NUMBER_WORDS and before not in ("per", "each", "every"):
            return None
        before = plain
        if is_per:
            continue
        if is_algebra(between, word, known, found["power"], bare=names["unit"] is None):
            return None
        if plain in SQUARES:
            square = SQUARES[plain]
        elif plain in SQUARED:
            if names[part] in (None, NOUN):
                return None
            powers[part] = SQUARED[plain]
        elif known and part == "unit" and currency and names["unit"] not in (None, NOUN, known):
            return None
        elif known in SPEEDS:
            names["unit"], names["per"] = SPEEDS[known]
        elif known and names[part] in (None, NOUN, "degree"):
            names[part], powers[part] = known, int(found["power"] or square)
        else:
            names[part] = names[part] or NOUN
    unit, per = ((names[part], powers[part]) if names[part] else None for part in names)
    return Quantity(value, unit, per)


def find_unit(word: str, last: bool) -> str | None:
    """Return the unit of measure that a word names, or None; `in` is inches at the end alone."""
    if len(word) == 1 and word.isascii() and word.isalpha():
        return CANONICAL.get("l" if word == "L" else word)
    word = "inch" if word == "in" and last else word.lower().replace(" ", "")
    return CANONICAL.get(word) or CANONICAL.get(word.removesuffix("s"))


def find_scale(found: re.Match[str]) -> int | None:
    """Return the factor that a word directly after its number stands for, or None."""
    if found["between"] == "":
        return 1000 if found["word"] == "k" else None
    name = found["word"].lower().removesuffix("s")
    return SCALES.get(name) if found["between"] == " " else None


def is_algebra(between: str, word: str, known: str | None, power: str | None, bare: bool) -> bool:
    """Return whether a word may stand for a number or hide one: `8i`, `8-xy`, `5 x`, `1/n`, `3万`.

    A noun of three letters or fewer must stand apart (`4 men`); `8-m` and `1/m` are algebra too.
    """
    if word[0].lower() == word[0].upper():
        return known is None and not NUMERALS.isdisjoint(word)
    if len(word) == 1 and (between == "-" or ("/" in between and bare)):
        return True
    return known is None and (power is not None or len(word) < (2 if between == " " else 4))
