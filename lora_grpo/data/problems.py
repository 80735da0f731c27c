"""Problems: questions with gold answers, the gold answer already taken from its field.

A dataset's name and a split go in; its rows become `Problem`s, by columns that are found or named.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

from lora_grpo.data.columns import (
    ANSWERS,
    ASSISTANTS,
    USERS,
    Row,
    describe_chats,
    describe_columns,
    find_columns,
    find_question,
    get,
    list_columns,
    read_fields,
    unused_context,
)
from lora_grpo.data.gold import (
    DecimalSeparator,
    choose_separator,
    describe_units,
    find_gold,
    find_golds,
    swap_separators,
)
from lora_grpo.data.sources import read_rows, resolve_split
from lora_grpo.tasks.task import NUMBER_TASK, Task

INSTRUCTIONS = ("\\boxed", "####", "Answer:")


@dataclass(frozen=True)
class Problem:
    """One question and its gold answer; `row` counts the dataset's rows from 1, `solution` is the
    worked text if any, `columns` the row as it was read, `source` the text that held the answer."""

    row: int
    question: str
    answer: str
    solution: str | None = None
    columns: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)

    def as_record(self) -> dict[str, Any]:
        """Return what files keep of the problem: all but the columns, which may hold anything."""
        names = ("row", "question", "answer", "solution")
        return {name: getattr(self, name) for name in names}

    def as_row(self) -> dict[str, Any]:
        """Return what a task may ask: every column, with `question` and `answer` as they were
        read."""
        return {**self.columns, "question": self.question, "answer": self.answer}


@dataclass(frozen=True)
class Reading:
    """What a split was read as: its problems, the rows that lack a question or an answer, how
    gold answers write decimals, a sentence for each thing that is not as usual, and the task that
    judges their answers. `dataset` is the flag with its value."""

    dataset: str
    split: str
    problems: list[Problem]
    blank: list[int]
    decimal_separator: DecimalSeparator
    notes: tuple[str, ...]
    task: Task = NUMBER_TASK


def choose_text(texts: Sequence[str]) -> str:
    """Return the answer that counts of several: the first that is a number, else the first; empty
    text for none."""
    if len(texts) < 2:
        return "".join(texts)
    return next((text for text in texts if find_gold(text).is_number), texts[0])


def read_answers(rows: Sequence[Row], columns: list[str]) -> tuple[list[str], list[str]]:
    """Return the answer's text in each row, empty where there is none, and maybe a note."""
    found = read_fields(rows, columns, ASSISTANTS)
    if len(columns) > 1:
        return ["\n".join(texts) for texts in found], []
    several = [number for number, texts in enumerate(found, start=1) if len(texts) > 1]
    notes = [
        f"{len(several)} rows hold several answers, such as row {number}: only the first number "
        "among them is paid"
        for number in several[:1]
    ]
    return [choose_text(texts) for texts in found], notes


def describe_instructions(questions: Sequence[str]) -> list[str]:
    """Return a note where most questions say themselves how to answer, as verl's prompts do."""
    for mark in INSTRUCTIONS:
        asking = [question for question in questions if mark in question]
        if 2 * len(asking) > len(questions):
            return [
                f"{len(asking)} questions say themselves how to answer, with {mark}, such as "
                f"{asking[0][-80:]!r}: the built-in rewards pay only what stands in "
                f"{Task.answer[0]} tags"
            ]
    return []


def to_problems(
    rows: list[Row],
    question_columns: list[str],
    answer_columns: list[str],
    decimal_separator: DecimalSeparator,
) -> tuple[list[Problem], DecimalSeparator, list[str]]:
    """Return the problems of the rows that have a question and an answer, how their gold answers
    write decimals, and notes."""
    questions = ["\n".join(texts) for texts in read_fields(rows, question_columns, USERS)]
    answers, several = read_answers(rows, answer_columns)
    kept = [index for index, text in enumerate(answers) if text and questions[index]]
    if not kept:
        raise ValueError(
            f"has no usable rows: {'+'.join(question_columns)} or {'+'.join(answer_columns)} is "
            "empty in each"
        )
    golds, layouts = find_golds([answers[index] for index in kept])
    texts = [gold.answer for gold in golds]
    if all(isinstance(get(rows[index], answer_columns[-1]), Number) for index in kept):
        decimal_separator = "point"
    separator, separators = choose_separator(texts, decimal_separator)
    if separator == "comma":
        texts = [swap_separators(text) or text for text in texts]
    problems = [
        Problem(
            row=index + 1,
            question=questions[index],
            answer=text,
            solution=answers[index].rpartition("####")[0].strip() or None,
            columns=rows[index],
            source=answers[index],
        )
        for index, text in zip(kept, texts, strict=True)
    ]
    asked = describe_instructions([problem.question for problem in problems])
    notes = [*describe_chats(rows, question_columns), *asked, *several, *layouts, *separators]
    return problems, separator, [*notes, *describe_units(texts)]


def read_problems(
    dataset: str,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
    flag: str = "--dataset",
    decimal_separator: DecimalSeparator = "auto",
    task: Task | None = None,
) -> Reading:
    """Return the problems of a dataset's split (see `resolve_split`), and how they were read;
    `flag` is what errors call the dataset by. Without a task it is chosen from the gold answers.

    Raises:
        FileNotFoundError: no such file or Hub dataset.
        ValueError: broken or empty data, or a column that is not there.
    """
    try:
        found = resolve_split(dataset, split)
        table = read_rows(dataset, found)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{flag} {error}") from error
    try:
        columns = list_columns(table.rows)
        question = find_question(columns, question_column)
        answer = find_columns(columns, answer_column, ANSWERS, "answer")
        problems, separator, said = to_problems(table.rows, question, answer, decimal_separator)
    except ValueError as error:
        raise ValueError(f"{flag} {dataset} {error}") from error
    blank = sorted(set(range(1, len(table.rows) + 1)) - {problem.row for problem in problems})
    notes = [*table.notes, *describe_columns(question, answer), *said]
    notes += unused_context(columns, question, answer)
    if found != split:
        notes.append(f"{dataset} has no {split} split: its {found} split stands for it")
    return Reading(
        f"{flag} {dataset}",
        found,
        problems,
        blank,
        separator,
        tuple(notes),
        task or NUMBER_TASK,
    )


def load_problems(
    dataset: str,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """Return the problems of a dataset, rows without a question or an answer left out; raises as
    `read_problems` does."""
    return read_problems(dataset, split, question_column, answer_column).problems


def normalise(question: str) -> str:
    """Return a question as it is compared: letter case and white space do not tell two apart."""
    return re.sub(r"\s+", " ", question).strip().lower()


def take_example(train: list[Problem], wanted: bool) -> tuple[list[Problem], Problem | None]:
    """Set the first problem with a worked solution apart as the example, where one is wanted;
    repeats of its question go too."""
    if not wanted:
        return train, None
    example = next((problem for problem in train if problem.solution), None)
    if example is None:
        raise ValueError(
            "--one-shot needs a training row with a worked solution before ####, found none: leave "
            "it out"
        )
    question = normalise(example.question)
    return [problem for problem in train if normalise(problem.question) != question], example
