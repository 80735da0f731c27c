"""Any text as Markdown that cannot break the page around it."""

import re

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#])")


def escape(text: str) -> str:
    """Return the text on one line, its Markdown and HTML characters taken literally."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def code(text: str) -> str:
    """Return the text on one line as inline code."""
    text = " ".join(text.split())
    ticks = "`" * (longest_ticks(text) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fence(text: str, language: str = "text") -> str:
    """Return the text as a block of code, fenced by more backticks than it holds in a row."""
    ticks = "`" * max(3, longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"
