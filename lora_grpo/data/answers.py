"""The gold answers of a dataset, read as its task reads answers, and which task they show.

The questions and the texts in the answer columns go in, of all rows at once, since how answers are
written is decided for all of them. For a choice the options of other columns join the question.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_grpo.data.columns import Row
from lora_grpo.data.gold import (
    CHOICE,
    WORD,
    DecimalSeparator,
    bare_number,
    choose_separator,
    describe_units,
    find_gold,
    find_golds,
    find_marked,
    swap_separators,
)
from lora_grpo.data.options import find_letters, read_options
from lora_grpo.tasks.choice import CHOICE_TASK, find_options, last_choice, list_options, read_choice
from lora_grpo.tasks.latex import MATH_TASK, unwrap
from lora_grpo.tasks.task import NUMBER_TASK, Task
from lora_grpo.tasks.text import TEXT_TASK, join_golds

# A task is chosen where at least this share of the gold answers is of its kind; numbers count as
# the task if they are half, because rows that are none can be dropped.
MOST, HALF = 0.95, 0.5
LONGEST_TEXT, MOST_WORDS = 60, 6
FORMULA = re.compile(r"[\\^_=<>{}|]|[0-9a-z)][-+*/]|^[(\[].*,|\bpi\b", re.IGNORECASE)


@dataclass(frozen=True)
class Fields:
    """What the rows that have a question and an answer hold: each list has one entry per row, and
    `answers` all texts of its answer. `option_columns` are those with options, if any."""

    rows: Sequence[Row]
    questions: list[str]
    answers: list[list[str]]
    joined: bool = False
    all_numbers: bool = False
    option_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Golds:
    """The questions, perhaps with their options, the gold answers, the texts that they were read
    from, and notes on what is not as usual."""

    questions: list[str]
    answers: list[str]
    sources: list[str]
    notes: list[str]
    decimal_separator: DecimalSeparator = "point"


def choose_text(texts: Sequence[str]) -> str:
    """Return the answer that counts of several: the first that is a number, else the first; empty
    text for none."""
    if len(texts) < 2:
        return "".join(texts)
    return next((text for text in texts if find_gold(text).is_number), texts[0])


def read_numbers(fields: Fields, separator: DecimalSeparator) -> Golds:
    """Return gold answers that are numbers, the first one where a row holds several."""
    sources, notes = ["\n".join(texts) for texts in fields.answers], []
    several = [] if fields.joined else [len(texts) > 1 for texts in fields.answers]
    if any(several):
        sources = [choose_text(texts) for texts in fields.answers]
        shown = fields.answers[several.index(True)]
        notes.append(
            f"{sum(several)} rows hold several answers, such as {shown}: only the first number "
            "among them is paid"
        )
    golds, layouts = find_golds(sources)
    texts = [gold.answer for gold in golds]
    found, separators = choose_separator(texts, "point" if fields.all_numbers else separator)
    if found == "comma":
        texts = [swap_separators(text) or text for text in texts]
    notes += [*layouts, *separators, *describe_units(texts)]
    return Golds(fields.questions, texts, sources, notes, found)


def read_choices(fields: Fields, separator: DecimalSeparator) -> Golds:
    """Return gold answers as letters of options; those in columns of their own join a question
    that does not list them already."""
    texts = [" ".join(texts) for texts in fields.answers]
    sources = ["\n".join(texts) for texts in fields.answers]
    if not fields.option_columns:
        letters = [
            letter_of(text, find_options(question))
            for text, question in zip(texts, fields.questions, strict=True)
        ]
        return Golds(fields.questions, letters, sources, [])
    options = [read_options(row, fields.option_columns) for row in fields.rows]
    found, positions = find_letters(texts, options)
    letters = [
        letter or letter_of(text, find_options(list_options(listed)))
        for letter, text, (_, listed) in zip(found, texts, options, strict=True)
    ]
    questions = [
        question if find_options(question) else f"{question}\n{list_options(listed)}"
        for question, (_, listed) in zip(fields.questions, options, strict=True)
    ]
    notes = [f"options from {' + '.join(fields.option_columns)}, listed under each question"]
    return Golds(questions, letters, sources, [*notes, *positions])


def letter_of(text: str, options: dict[str, str]) -> str:
    """Return the letter of the option that a gold answer names, or the text where it names none."""
    marked = find_marked(text)
    tries = (marked or text, (last_choice(text) or "") if options else "")
    return next((letter for one in tries if (letter := read_choice(one, options))), text)


def read_words(fields: Fields, separator: DecimalSeparator) -> Golds:
    """Return gold answers that are texts: all that a row holds, each of which is right."""
    sources = ["\n".join(texts) for texts in fields.answers]
    several = [
        sources[index : index + 1] if fields.joined else texts
        for index, texts in enumerate(fields.answers)
    ]
    golds = [join_golds([find_marked(text) or text for text in texts]) for texts in several]
    return Golds(fields.questions, golds, sources, [])


def read_formulas(fields: Fields, separator: DecimalSeparator) -> Golds:
    """Return gold answers that are formulas: what is marked as the answer, else the whole text."""
    sources = [texts[0] if len(texts) == 1 else "\n".join(texts) for texts in fields.answers]
    golds = [unwrap(find_marked(text) or text) for text in sources]
    return Golds(fields.questions, golds, sources, [])


def read_raw(fields: Fields, separator: DecimalSeparator) -> Golds:
    """Return what the answer columns hold, as it is."""
    texts = ["\n".join(texts) for texts in fields.answers]
    return Golds(fields.questions, texts, texts, [])


READERS: dict[str, Callable[[Fields, DecimalSeparator], Golds]] = {
    "number": read_numbers,
    "choice": read_choices,
    "text": read_words,
    "math": read_formulas,
}


def read_golds(task: Task, fields: Fields, separator: DecimalSeparator) -> Golds:
    """Return the gold answers of a dataset as a task reads them."""
    return READERS.get(task.name, read_raw)(fields, separator)


def share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def describe_choice(holds: Sequence[bool], what: str) -> str:
    return f"{sum(holds):,} of {len(holds):,} gold answers {what}"


def choose_task(fields: Fields) -> tuple[Task, str]:
    """Return the task that the gold answers show, and why; numbers where they leave a doubt, with
    the flag that decides it."""
    sources = [choose_text(texts) for texts in fields.answers]
    numbers = [gold.is_number for gold in find_golds(sources)[0]]
    if share(numbers) >= HALF:
        why = describe_choice(numbers, "are numbers")
        if fields.option_columns:
            why += f"; --task choice asks for one of the options in {fields.option_columns[0]}"
        others = [text for text, number in zip(sources, numbers, strict=True) if not number]
        if others and share([is_formula(find_marked(text) or text) for text in others]) >= HALF:
            why += ", the others formulas, which --task math reads"
        return NUMBER_TASK, why
    choices = read_choices(fields, "point")
    letters = [CHOICE.fullmatch(text) is not None for text in choices.answers]
    listed = [bool(find_options(question)) for question in choices.questions]
    if share([letter and there for letter, there in zip(letters, listed, strict=True)]) >= MOST:
        return CHOICE_TASK, describe_choice(letters, "name an option of their question")
    if all(letters):
        return CHOICE_TASK, describe_choice(letters, "are single letters, without options beside")
    golds = [find_marked(text) or text for text in sources]
    formulas = [bare_number(gold) is not None or is_formula(gold) for gold in golds]
    if share(formulas) >= MOST:
        return MATH_TASK, describe_choice(formulas, "are numbers or formulas")
    short = [len(gold) <= LONGEST_TEXT and len(gold.split()) <= MOST_WORDS for gold in golds]
    if share(short) >= MOST and not any(map(is_formula, golds)):
        return TEXT_TASK, describe_choice(short, f"have {MOST_WORDS} words or fewer")
    return NUMBER_TASK, (
        f"in doubt, {describe_choice(numbers, 'are numbers')}: --task text, math, choice or own "
        "says what the others are"
    )


def is_formula(gold: str) -> bool:
    """Return whether a gold answer is written in mathematics, and not in words."""
    commands = re.sub(r"\\[A-Za-z]+", "", gold)
    return FORMULA.search(gold) is not None and len(WORD.findall(commands)) <= 1
