"""Which columns hold the question and the answer, and what they say as text.

Rows by column go in. A column is named by its path: `question`, `reward_model.ground_truth` inside
of a struct, `body+question` for two that are joined; chat messages count as text.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from math import isnan
from numbers import Number
from typing import Any

from lora_grpo.data.tables import is_chat

Row = dict[str, Any]

CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
QUESTIONS = (
    *("question", "problem", "prompt", "query", "instruction", "input", "task"),
    *("problem_statement", "question_text", *CHATS, "text"),
)
# The bare answer before a worked one.
ANSWERS = (
    *("ground_truth", "final_answer", "expected_answer", "answer", "gold_answer", "gold"),
    *(
        "correct_answer",
        "gt_answer",
        "answer_key",
        "target",
        "solution",
        "correct",
        "result",
        "answers",
    ),
    *("output", "response", "completion", "label", "expected_output", "reference_answer"),
    *CHATS,
)
# Text that may belong to the question: said where it is not read.
BEFORE_THE_QUESTION = ("body", "context", "passage", "story", "background")
CONTEXTS = (*BEFORE_THE_QUESTION, "choices", "options", "input")
TEXT_KEYS = ("content", "value", "text", "ground_truth")
SYSTEMS = ("system", "developer")
USERS, ASSISTANTS = ("user", "human"), ("assistant", "gpt", "model", "bot", "chatgpt")
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
# Lists and objects as text: JSON, or as Python prints them into the cells of a CSV file.
LITERAL_START = re.compile(r"""\s*(?:\[\s*["'{]|\{\s*["'])""")
NO_LITERAL = (ValueError, SyntaxError, RecursionError, MemoryError)


def squash(name: str) -> str:
    """Return a column's name as it is compared: `Final Answer` is `final_answer`."""
    return re.sub(r"[^\w.]|_", "", name.casefold())


def list_columns(rows: Sequence[Row]) -> dict[str, bool]:
    """Return the paths of all columns, each with whether any row holds something there."""
    filled: dict[str, bool] = {}
    for row in rows:
        for key, value in row.items():
            filled[key] = filled.get(key, False) or value not in (None, "", [])
            for part in as_struct(value):
                filled.setdefault(f"{key}.{part}", True)
    return filled


def match(columns: Iterable[str], name: str, nested: bool = True) -> str | None:
    """Return the column of a name, exactly, or except for letter case and separators, or the one
    inside of a struct that ends on it."""
    wanted, columns = squash(name), list(columns)
    if name in columns:
        return name
    same = [column for column in columns if squash(column) == wanted]
    inside = [column for column in columns if nested and squash(column).endswith("." + wanted)]
    return next(iter(same + inside), None)


def find_usual(columns: dict[str, bool], names: Sequence[str]) -> str | None:
    """Return the first column of a usual name: one that holds something before an empty one, one
    by itself before one inside of a struct."""
    holding = [column for column, filled in columns.items() if filled]
    tries = [(holding, False), (holding, True), (list(columns), True)]
    found = (match(some, name, nested) for some, nested in tries for name in names)
    return next(filter(None, found), None)


def find_columns(
    columns: dict[str, bool], named: str | None, usual: Sequence[str], kind: str
) -> list[str]:
    """Return the columns of a kind, question or answer, that its flag names, joined by `+`, or the
    first of the usual ones.

    Raises:
        ValueError: there is none of that name.
    """
    if named is None:
        found = [find_usual(columns, usual)]
        missing = f"for the {kind}"
    else:
        parts = [named] if match(columns, named) else named.split("+")
        found = [match(columns, part) for part in parts]
        missing = " or ".join(part for part, column in zip(parts, found, strict=True) if not column)
    if None in found:
        raise ValueError(
            f"has no column {missing} among {', '.join(columns)}: name the question's by "
            "--question-column and the answer's by --answer-column"
        )
    return found


def find_question(columns: dict[str, bool], named: str | None) -> list[str]:
    """Return the columns of the question, Alpaca's `instruction` together with its `input`."""
    found = find_columns(columns, named, QUESTIONS, "question")
    more = match([column for column, filled in columns.items() if filled], "input", nested=False)
    alone = named is None and squash(found[0]) == "instruction"
    return [*found, more] if alone and more else found


def describe_columns(question: Sequence[str], answer: Sequence[str]) -> list[str]:
    """Return a note that names the columns, unless they go by the names that everyone expects."""
    plain = [squash(name) for name in question] in (["question"], ["problem"], ["prompt"])
    if plain and [squash(name) for name in answer] in (["answer"], ["solution"]):
        return []
    return [f"question from {' + '.join(question)}, answer from {' + '.join(answer)}"]


def unused_context(columns: dict[str, bool], question: list[str], answer: list[str]) -> list[str]:
    """Return a note for each column whose text may belong to the question and is not read."""
    notes = []
    for name in CONTEXTS:
        column = match(columns, name, nested=False)
        used = [part.partition(".")[0] for part in (*question, *answer)]
        if column is None or not columns[column] or column in (*question, *answer, *used):
            continue
        before = name in BEFORE_THE_QUESTION
        joined = "+".join([column, *question] if before else [*question, column])
        notes.append(
            f"column {column} is not part of the question: join it by --question-column {joined}"
        )
    return notes


def get(row: Row, path: str) -> Any:
    """Return what a row holds at a column's path, None where it lacks it."""
    if path in row or "." not in path:
        return row.get(path)
    outer, _, inner = path.partition(".")
    return as_struct(row.get(outer)).get(inner)


def read_literal(value: Any) -> Any:
    """Return the list or object that a text spells out, in JSON or in Python; else the value."""
    if isinstance(value, str) and LITERAL_START.match(value):
        for read in (json.loads, ast.literal_eval):
            with suppress(*NO_LITERAL):
                return read(value)
    return value


def as_struct(value: Any) -> dict[str, Any]:
    """Return the object that a field is, perhaps as text; an empty one if it is something else."""
    found = read_literal(value)
    return found if isinstance(found, dict) else {}


def simplify(value: Any) -> Any:
    """Return a value without what only wraps it: a list or an object of one, perhaps as text, the
    parts of a turn's text."""
    found = read_literal(value)
    if found is not value:
        inner = simplify(found)
        return value if isinstance(inner, dict) else inner
    if isinstance(value, list) and len(value) == 1 and not is_chat(value):
        return simplify(value[0])
    if isinstance(value, dict):
        keys = [*value] if len(value) == 1 else [key for key in TEXT_KEYS if key in value]
        return simplify(value[keys[0]]) if keys else value
    return value


def number_as_text(number: Number) -> str:
    """Return a number as people write it: 0.0000020107 and not 2.0107e-06, 5 and not 5.0."""
    if isinstance(number, float):
        return "" if isnan(number) else format(Decimal(repr(number)), "f").removesuffix(".0")
    return format(number, "f") if isinstance(number, Decimal) else str(number)


def last_turn(chat: list[Row], roles: Sequence[str]) -> list[str]:
    """Return what the last turn of these roles says."""
    for turn in reversed(chat):
        if role_of(turn) in roles:
            text = next((turn[key] for key in TEXT_KEYS if key in turn), None)
            return read_texts(text, roles)
    return []


def role_of(turn: Row) -> str:
    return str(turn.get("role", turn.get("from"))).lower()


def read_texts(value: Any, roles: Sequence[str]) -> list[str]:
    """Return the texts that a field holds, none for nothing: one, or those of a list; of chat
    messages the last turn of these roles.

    Raises:
        TypeError: it is something else.
    """
    value = simplify(value)
    if is_chat(value):
        return last_turn(value, roles)
    if isinstance(value, list):
        return [text for item in value for text in read_texts(item, roles)]
    if isinstance(value, str | Number):
        text = (value if isinstance(value, str) else number_as_text(value)).strip()
        return [text] if text else []
    if value is None:
        return []
    raise TypeError(type(value).__name__)


def read_fields(
    rows: Sequence[Row], columns: Sequence[str], roles: Sequence[str]
) -> list[list[str]]:
    """Return the texts that each row holds in the columns, of chat messages those of the roles.

    Raises:
        ValueError: a row holds something else, or half a character.
    """
    fields: list[list[str]] = []
    for number, row in enumerate(rows, start=1):
        fields.append([])
        for column in columns:
            try:
                texts = read_texts(get(row, column), roles)
            except TypeError as error:
                raise ValueError(
                    f"row {number}: {column} must be text, a number or chat messages, got a "
                    f"{error}: name another column by --question-column or --answer-column"
                ) from None
            if any(map(HALF_CHARACTER.search, texts)):
                raise ValueError(
                    f"row {number}: {column} holds half a character (an escape such as \\ud83d "
                    "alone): mend it"
                )
            fields[-1] += texts
    return fields


def describe_chats(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return a note for what is left out of the chats that hold the questions: the system's turn,
    and all but the last of several questions."""
    systems: list[str] = []
    longer = 0
    for row in rows:
        for chat in filter(is_chat, (simplify(get(row, column)) for column in columns)):
            systems += last_turn(chat, SYSTEMS)
            longer += sum(role_of(turn) in USERS for turn in chat) > 1
    notes = []
    if systems:
        notes.append(
            f"a system turn in {len(systems)} rows is left out, such as {systems[0][:60]!r}: "
            "--system-prompt-file replaces this project's own"
        )
    if longer:
        notes.append(
            f"{longer} chats hold several questions: the last one is read, with its answer"
        )
    return notes
