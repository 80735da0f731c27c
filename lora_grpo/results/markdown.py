"""Any text as Markdown that cannot break the page around it: inline code, fences, table cells."""

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#])")


def flatten(text: str) -> str:
    """Return the text on one line."""
    return " ".join(text.split())


def escape(text: str) -> str:
    """Return the text on one line, its Markdown and HTML characters taken literally."""
    return SPECIAL.sub(r"\\\1", flatten(text))


def longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def code(text: str) -> str:
    """Return the text on one line as inline code."""
    text = flatten(text)
    ticks = "`" * (longest_ticks(text) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fence(text: str, language: str = "text") -> str:
    """Return the text as a block of code, fenced by more backticks than it holds in a row."""
    ticks = "`" * max(3, longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the columns after the first stand to the right, unless there are only two."""
    align = ["---", "---"] if len(header) == 2 else ["---", *["---:"] * (len(header) - 1)]
    cells = [header, align, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
