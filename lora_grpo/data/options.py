"""Options of a multiple choice in columns of their own, and what a gold answer says of them.

Lists, texts with labels, one column per option: in each case the texts come out in their order, so
that the question can list them by letter.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lora_grpo.data.columns import Row, get, match, read_texts, simplify
from lora_grpo.tasks.choice import LETTERS, read_choice, same_option

LISTS = ("choices", "options", "endings", "answer_choices", "candidates")
# One column per option, as MedMCQA and WinoGrande have them.
SETS = (
    ("A", "B", "C", "D", "E"),
    ("opa", "opb", "opc", "opd", "ope"),
    ("option1", "option2", "option3", "option4", "option5"),
    ("option_a", "option_b", "option_c", "option_d", "option_e"),
)
OWN_LABEL = re.compile(r"\s*[(\[]?([A-Ja-j])\s?[)\].:]\s*(?=\S)")


def find_option_columns(columns: dict[str, bool], used: Sequence[str]) -> list[str]:
    """Return the columns that hold the options: one with all of them, or one for each; none where
    there are none, or where they belong to the question already."""
    free = [name for name, filled in columns.items() if filled and name not in used]
    whole = next(filter(None, (match(free, name, nested=False) for name in LISTS)), None)
    if whole:
        return [whole]
    for names in SETS:
        found = [column for name in names if (column := match(free, name, nested=False))]
        if len(found) > 1:
            return found
    return []


def read_options(row: Row, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the labels and the texts of a row's options."""
    if len(columns) > 1:
        return split_labels([" ".join(texts_of(get(row, column))) for column in columns])
    value = get(row, columns[0])
    if isinstance(value, str):  # JSON, perhaps
        value = simplify(value)
    if isinstance(value, dict) and {"text", "label"} <= value.keys():
        texts = [" ".join(texts_of(text)) for text in value["text"]]
        return [str(label) for label in value["label"]], texts
    if isinstance(value, dict):
        return [*map(str, value)], [" ".join(texts_of(text)) for text in value.values()]
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        labels = [str(one.get("label", one.get("key", ""))) for one in value]
        return labels, [" ".join(texts_of(one)) for one in value]
    return split_labels([" ".join(texts_of(one)) for one in value or []])


def texts_of(value: Any) -> list[str]:
    with suppress(TypeError):
        return read_texts(value, ())
    return []


def split_labels(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return labels by position, and the texts without those that they begin with in turn."""
    texts = [text for text in texts if text]
    found = [OWN_LABEL.match(text) for text in texts]
    own = [label[1].upper() if label else "" for label in found]
    labels = list(LETTERS[: len(texts)])
    if own == labels:
        texts = [text[label.end() :] for text, label in zip(texts, found, strict=True)]
    return labels, texts


def find_letters(
    golds: Sequence[str], options: Sequence[tuple[list[str], list[str]]]
) -> tuple[list[str | None], list[str]]:
    """Return the letter of the option that each gold answer means, by its label, text or position,
    and a note where they are positions."""
    counts = [len(texts) for _, texts in options]
    pairs = list(zip(golds, options, strict=True))
    labelled = all(gold in labels for gold, (labels, _) in pairs)
    named = all(any(same_option(gold, text) for text in texts) for gold, (_, texts) in pairs)
    first = first_position(golds, counts)
    if labelled or named or first is None:
        return [find_letter(gold, *option) for gold, option in pairs], []
    letters = [LETTERS[int(gold) - first] for gold in golds]
    return letters, [f"gold answers are positions of options, counted from {first}"]


def find_letter(gold: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    """Return the letter of the option that a gold answer means by its label, its text or its
    letter, or None."""
    letters = LETTERS[: len(texts)]
    by_label = dict(zip(labels, letters, strict=False))
    return by_label.get(gold) or read_choice(gold, dict(zip(letters, texts, strict=False)))


def first_position(golds: Sequence[str], counts: Sequence[int]) -> int | None:
    """Return whether gold answers are positions of options counted from 0 or from 1, or None where
    they are none: from 1 where none is 0 and one is the number of its row's options."""
    if not all(
        gold.isdecimal() and int(gold) <= most for gold, most in zip(golds, counts, strict=True)
    ):
        return None
    numbers = [int(gold) for gold in golds]
    at_end = any(number == most for number, most in zip(numbers, counts, strict=True))
    return None if at_end and 0 in numbers else int(at_end)
