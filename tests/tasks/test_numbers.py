"""The number rule: which texts are one number, and which two are the same."""

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_grpo.tasks.numbers import last_number, parse_number, read_quantity, same_number, to_plain

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

PIECES = ["<answer>", "</answer>", "\n", " ", "x", "7", "72", "-", "\u2212", "$", ",", "."]
PIECES += ["/", "%", "k", "\u0663"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
numbers = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.integers(-(10**12), 10**12).map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=3).map("{:f}".format),
    st.builds("{}/{}".format, st.integers(-999, 999), st.integers(1, 999)),
)

NO_NUMBERS = [
    *("", "x", "seventy-two", "NaN", "nan", "inf", "-inf", "1e9999", "2^10", "0x10", "A", "yes"),
    *("1,20", "1,2345", "1234,567", "0,200", ",200", "7,2", "1.2.3", "1 20", "0 200"),
    *("3 K", "$3M", "2bn", "7 thirds", "5 squared", "5!", "3万"),
    *("2 and a half", "2 3/2", "2\\frac{3}{2}", "72 or 73", "72 or seventy-three", "$5 $600"),
    *("--3", "-$-3", "- 3", "(3)", "3-", "1/0", "1/2/3", "72...", "~72", "about 72"),
    *("\uff17\uff12", "\u0667", "7\u00a02", "9" * 101, "72" + " very" * 30),
    *("8-i", "8i", "8 - i", "3x", "5 x", "2ab", "8-xy", "1/n", "5/m", "8-m", "2\\pi", "2\u03c0"),
    *("x^2+1", "\\sqrt{2}", "3+4i", "5^2", "5\u00b2", "16 x^2", "\\frac{1}{2}x", "2**3"),
    *("\\frac123", "\\frac{1}{0}", "(1, 2)", "3:30", "1:2", "3-5", "3 to 5", "2024-01-05"),
    *("$5 cents", "5 dollars and 20 cents", "5 apples, 3 pears", "48 + 24 = 72"),
]
# Pairs of a gold answer and an answer between the tags: what is exact and unambiguous is paid.
PAID = [
    *[("1,200", "1200"), ("$1200.00", "1200"), ("$1,200.00", "1,200"), ("1,234,567", "1234567")],
    *[("\u22123", "-3"), ("-$3", "-3"), ("$-3", "-3"), ("+3", "3"), ("-0", "0")],
    *[("72 clips", "72"), ("72clips", "72"), ("72 clips per day.", "72"), ("72.", "72")],
    *[("5 km/h", "5"), ("$3 per dozen", "3"), ("3.50.", "3.5"), (".5", "0.5"), ("007", "7")],
    *[("1/2", "0.5"), ("-1/3", "-2/6"), (" 72\n", "72"), ("50%", "50")],
    *[("28%", "28"), ("28\\%", "28%"), ("28 percent", "28 %"), ("50", "50 pct")],
    *[("9500", "$9{,}500"), ("9500", "9 500"), ("9500", "9\u202f500"), ("9500", "9_500")],
    *[("9500", "9'500"), ("9500", "9.500,00"), ("100000", "1,00,000"), ("10000", "10,\\!000")],
    *[("\\frac{1}{2}", "1/2"), ("\\dfrac12", "0.5"), ("7/2", "3 1/2"), ("3\\frac{1}{2}", "3.5")],
    *[("-1/3", "-\\frac{1}{3}"), ("-1/3", "\\frac{-1}{3}"), ("1/2", "\u00bd")],
    *[("-2.5", "-2\u00bd"), ("3.5 per cent", "3.5")],
    *[("1e5", "100000"), ("5 \\times 10^3", "5000"), ("3x10^2", "300"), ("10^6", "1000000")],
    *[("0.00001", "1e-5"), ("2.0107e-06", "0.0000020107"), ("5e+16", "50000000000000000")],
    *[("10^{-3}", "0.001"), ("3 \u00d7 10\u2078 m/s", "3e8")],
    *[("-5", "\u20135"), ("-5", "minus 5"), ("-5", "negative 5"), ("$-5", "-$5")],
    *[("16", "16 cm^2"), ("16 cm\u00b2", "16 square cm"), ("16 cm2", "16\\text{ cm}^2")],
    *[("16 sq. cm", "16 centimeters squared"), ("90^\\circ", "90 degrees"), ("90", "90\u00b0")],
    *[("20 \u00b0C", "20 degrees Celsius"), ("60 mph", "60 miles per hour"), ("5 m/s", "5")],
    *[("6 feet", "6 ft"), ("12 in", "12 inches"), ("2 h", "2 hours"), ("60\u516c\u91cc", "60 km")],
    *[("60", "\u20b960"), ("60", "60\u5143"), ("60", "Rs. 60"), ("60", "USD 60"), ("60", "US$60")],
    *[("$5", "5 dollars"), ("$5/hour", "$5"), ("$1.5 million", "1500000")],
    *[("72 clips per day", "72 clips"), ("9 (apples)", "9"), ("9 apples", "9 kids")],
    *[("5", "5 a\u00f1os"), ("3", "3\u4e2a"), ("4", "4 men")],
    *[("72", "\\boxed{72}"), ("72", "$72$"), ("72 cm", "$$72$$"), ("5", "$\\$5$")],
    ("72", "**72**"),
    *[("x=72", "72"), ("72", "\\(72\\)"), ("72", "The answer is 72"), ("72", "72,")],
    *[("72", "`72`"), ("72", "#### 72"), ("72", '"72"')],
    *[("5 million", "5000000"), ("5k", "5000"), ("2 dozen eggs", "24")],
    ("2 hundred thousand", "2e5"),
]
# Two readings, a unit converted or contradicted, a rounding: not paid, though each is a number.
NOT_PAID = [
    *[("312", "12"), ("3", "-3"), ("72", "720"), ("0.1", "0.10000001"), ("1/3", "0.333")],
    *[("0.28", "28%"), ("50%", "0.5"), ("2 hours", "120 minutes"), ("1 m", "100 cm")],
    *[("2000 cm", "2000 m"), ("2000 cm", "20 m")],
    *[("5 km", "5 m"), ("2 hours", "2 minutes"), ("16 cm", "16 cm^2"), ("5 apples", "5 km")],
    *[("5 am", "5 pm"), ("20 \u00b0C", "20 \u00b0F"), ("$5", "5 cents"), ("$5", "\u20ac5")],
    *[("5%", "5 km"), ("72 clips per day", "72 clips per hour"), ("60 mph", "60 km per hour")],
    *[("0.3", "0.30000000000000004"), ("33.33", "33.333333333333336"), ("3.14", "3.14159")],
    *[("72", "72 million"), ("72", "72k"), ("-5", "5")],
]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_equals_nothing(text: str) -> None:
    assert parse_number(text) is None
    assert not same_number(text, text)


@pytest.mark.parametrize(("gold", "answer"), PAID)
def test_what_is_exact_and_unambiguous_is_paid(gold: str, answer: str) -> None:
    assert same_number(gold, answer) and same_number(answer, gold)
    assert not same_number(gold, f"1{answer}")


@pytest.mark.parametrize(("gold", "answer"), NOT_PAID)
def test_two_readings_or_two_units_are_not_paid(gold: str, answer: str) -> None:
    assert parse_number(gold) is not None and parse_number(answer) is not None
    assert not same_number(gold, answer) and not same_number(answer, gold)


@given(numbers)
def test_the_exact_value_is_read(text: str) -> None:
    assert parse_number(text) == Fraction(text.replace(",", ""))
    assert same_number(text, text)


@given(st.one_of(numbers, texts), st.one_of(numbers, texts))
def test_same_number_is_symmetric_and_never_raises(left: str, right: str) -> None:
    assert same_number(left, right) is same_number(right, left)


VALUES = ["5", "5.0", "10/2", "\\frac{10}{2}", "0.5e1", "6", "2 1/2", "2\u00bd", "5 dozen"]
UNITS = ["", " km", " kilometers", " m", " apples", " cm^2", "%", " km per hour", "-i"]
written = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "-", "$", "x = "]),
    st.sampled_from(VALUES),
    st.sampled_from(UNITS),
)


@given(written, written, written)
def test_same_number_is_transitive_where_each_writes_as_much(
    first: str, second: str, third: str
) -> None:
    """What one text leaves out is free, so that `5 km` and `5 m` both equal `5`."""
    read = [read_quantity(text) for text in (first, second, third)]
    alike = None not in read and len({(q.unit is None, q.per is None) for q in read}) == 1
    if alike and same_number(first, second) and same_number(second, third):
        assert same_number(first, third)


def write_fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def write_mixed(value: Fraction) -> str:
    whole, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    return f"{sign}{whole} {rest.numerator}/{rest.denominator}" if whole else str(value)


@given(
    st.fractions(-(10**6), 10**6, max_denominator=999),
    st.sampled_from([str, write_fraction, write_mixed]),
    st.sampled_from(["{}", "${}$", "\\boxed{{{}}}", "**{}**", "{} km", "{}.", "\\({}\\)", "= {}"]),
)
def test_writing_a_number_otherwise_never_changes_it(
    value: Fraction, write: Callable[[Fraction], str], around: str
) -> None:
    assert parse_number(around.format(write(value))) == value
    assert parse_number(around.format(write(value)).replace("-", "\u2212")) == value


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("<answer>\n72\n</answer>", "72"),
        ("5-3", "3"),
        ("x-3", "3"),
        ("(5)-3", "3"),
        ("50%-3", "3"),
        ("it is -3", "-3"),
        ("(-3)", "-3"),
        ("= \u22123.", "-3"),
        ("it is \u20133", "-3"),
        ("16 cm^2", "16"),
        ("16 cm\u00b2 or 16 cm2", "16"),
        ("so x^2 = 9, x^{10}", "9"),
        ("\\frac{1}{2}", "1/2"),
        ("3\\frac{1}{2} cups", "3 1/2"),
        ("3\\frac{5}{2}", "5/2"),
        ("is 5 \\times 10^3", "5 \u00d7 10^3"),
        ("2.5e-3.", "2.5e-3"),
        ("9{,}500", "9,500"),
        ("-$3", "-$3"),
        ("$-3", "$-3"),
        ("costs $1,200.00.", "1,200.00"),
        ("10/2=5", "5"),
        ("1 and .5", ".5"),
        ("72 clips, then 12", "12"),
        ("72 " + "9" * 200, "72"),
        ("none", None),
        ("\u0667\u0662", None),
    ],
)
def test_last_number(completion: str, number: str | None) -> None:
    assert last_number(completion) == number


@given(texts)
@example("$" * 9 + "-.")
def test_last_number_is_a_number_from_the_text(completion: str) -> None:
    found = last_number(completion)
    assert found is None or (found in to_plain(completion) and same_number(found, found))
