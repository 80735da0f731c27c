"""Problems: questions with gold answers, the gold answer already taken from its field.

A dataset's name and a split go in; its rows become `Problem`s, by columns that are found or named.
"""

import re
from dataclasses import dataclass, field, fields
from numbers import Number
from typing import Any

from lora_grpo.table import BUILT_IN, read_rows

__all__ = ["BUILT_IN", "Problem", "extract_gold", "load_problems", "read_problems"]

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "solution")
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """One question and its gold answer; `row` counts the dataset's rows from 1, `solution` is the
    worked text if any, `columns` the row as it was read."""

    row: int
    question: str
    answer: str
    solution: str | None = None
    columns: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def as_record(self) -> dict[str, Any]:
        """Return what files keep of the problem: all but the columns, which may hold anything."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name != "columns"
        }


def find_column(
    rows: list[dict[str, Any]], named: str | None, usual: tuple[str, ...], flag: str
) -> str:
    """Return the column that the flag names, or the first of the usual ones that is there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    wanted = (named,) if named else usual
    for column in wanted:
        if column in columns:
            return column
    raise ValueError(
        f"has no column {' or '.join(wanted)} among {', '.join(columns)}: name one by {flag}"
    )


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, its inner braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def extract_gold(field: str) -> str:
    r"""Return the gold answer: what follows the last `####`, else in `\boxed{}`, else the field."""
    if "####" in field:
        return field.rpartition("####")[2].strip()
    boxed = last_boxed(field)
    return field.strip() if boxed is None else boxed


def as_text(value: Any, row: int, column: str) -> str:
    """Return a field as stripped text, nothing as the empty text.

    Raises:
        ValueError: it is neither text nor a number, such as a list of chat messages, or it holds
        half a character.
    """
    if value is not None and not isinstance(value, str | Number):
        raise ValueError(
            f"row {row}: {column} must be text or a number, got a {type(value).__name__}: name "
            "another column by --question-column or --answer-column"
        )
    text = "" if value is None else str(value).strip()
    if HALF_CHARACTER.search(text):
        raise ValueError(
            f"row {row}: {column} holds half a character (an escape such as \\ud83d alone): mend it"
        )
    return text


def to_problems(
    rows: list[dict[str, Any]], question_column: str, answer_column: str
) -> tuple[list[Problem], list[int]]:
    """Return the problems, and the numbers of the rows that lack a question or an answer."""
    problems, blank = [], []
    for number, row in enumerate(rows, start=1):
        question = as_text(row.get(question_column), number, question_column)
        text = as_text(row.get(answer_column), number, answer_column)
        if question and text:
            solution = text.rpartition("####")[0].strip() or None
            problems.append(Problem(number, question, extract_gold(text), solution, row))
        else:
            blank.append(number)
    if not problems:
        raise ValueError(
            f"has no usable rows: {question_column} or {answer_column} is empty in each"
        )
    return problems, blank


def read_problems(
    dataset: str,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
    flag: str = "--dataset",
) -> tuple[list[Problem], list[int]]:
    """Return the problems of a dataset, and the numbers of the rows that lack a question or an
    answer; `flag` is what errors call the dataset by.

    Raises:
        FileNotFoundError: no such file or Hub dataset.
        ValueError: broken or empty data, or a column that is not there.
    """
    try:
        rows = read_rows(dataset, split)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{flag} {error}") from error
    try:
        question = find_column(rows, question_column, QUESTION_COLUMNS, "--question-column")
        answer = find_column(rows, answer_column, ANSWER_COLUMNS, "--answer-column")
        return to_problems(rows, question, answer)
    except ValueError as error:
        raise ValueError(f"{flag} {dataset} {error}") from error


def load_problems(
    dataset: str,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """Return the problems of a dataset, rows without a question or an answer left out; raises as
    `read_problems` does."""
    return read_problems(dataset, split, question_column, answer_column)[0]
