"""Problems: questions with gold answers, the gold answer already taken from its field.

A dataset's name and a split go in; its rows become `Problem`s, by columns that are found or named.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

from lora_grpo.data.answers import Fields, Golds, choose_task, read_golds
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
from lora_grpo.data.gold import DecimalSeparator
from lora_grpo.data.options import find_option_columns
from lora_grpo.data.procedural import write_solution
from lora_grpo.data.sources import read_rows, resolve_split
from lora_grpo.data.tables import Table
from lora_grpo.tasks.choice import CHOICE_TASK
from lora_grpo.tasks.reasoning_gym import PREFIX, REASONING_GYM
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
    judges their answers, with the reason. `dataset` is the flag with its value."""

    dataset: str
    split: str
    problems: list[Problem]
    blank: list[int]
    decimal_separator: DecimalSeparator
    notes: tuple[str, ...]
    task: Task = NUMBER_TASK
    why_task: str = ""


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


def read_fields_of(
    rows: list[Row], question_columns: list[str], answer_columns: list[str], options: list[str]
) -> tuple[list[int], Fields]:
    """Return the rows that have a question and an answer, by their index, and what these hold.

    Raises:
        ValueError: there are none.
    """
    questions = ["\n".join(texts) for texts in read_fields(rows, question_columns, USERS)]
    answers = read_fields(rows, answer_columns, ASSISTANTS)
    kept = [index for index, texts in enumerate(answers) if texts and questions[index]]
    if not kept:
        raise ValueError(
            f"has no usable rows: {'+'.join(question_columns)} or {'+'.join(answer_columns)} is "
            "empty in each"
        )
    numbers = [isinstance(get(rows[index], answer_columns[-1]), Number) for index in kept]
    return kept, Fields(
        rows=[rows[index] for index in kept],
        questions=[questions[index] for index in kept],
        answers=[answers[index] for index in kept],
        joined=len(answer_columns) > 1,
        all_numbers=all(numbers),
        option_columns=tuple(options),
    )


def to_problems(kept: Sequence[int], fields: Fields, golds: Golds) -> list[Problem]:
    """Return a problem for each of the rows `kept`."""
    parts = (kept, fields.rows, golds.questions, golds.answers, golds.sources)
    return [
        Problem(
            row=index + 1,
            question=question,
            answer=answer,
            solution=source.rpartition("####")[0].strip() or None,
            columns=row,
            source=source,
        )
        for index, row, question, answer, source in zip(*parts, strict=True)
    ]


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
    name = f"{flag} {dataset}"
    if dataset.startswith(PREFIX):
        named = (question_column or answer_column) is not None
        return take_procedural(name, found, table, task, named)
    if task is REASONING_GYM:
        raise ValueError(
            f"{name}: the task {task.name} judges only problems of its generators: use {flag} "
            f"{PREFIX}NAME, or train with --task number"
        )
    reading = take_table(
        name, found, table, question_column, answer_column, decimal_separator, task
    )
    if found == split:
        return reading
    instead = f"{dataset} has no {split} split: its {found} split stands for it"
    return replace(reading, notes=(*reading.notes, instead))


def take_table(
    dataset: str,
    split: str,
    table: Table,
    question_column: str | None,
    answer_column: str | None,
    decimal_separator: DecimalSeparator,
    task: Task | None,
) -> Reading:
    """Return the problems of a table, by columns that are found or named.

    Raises:
        ValueError: a column that is not there, or a task that cannot be used.
    """
    try:
        columns = list_columns(table.rows)
        question = find_question(columns, question_column)
        answer = find_columns(columns, answer_column, ANSWERS, "answer")
        options = find_option_columns(columns, [*question, *answer])
        kept, fields = read_fields_of(table.rows, question, answer, options)
    except ValueError as error:
        raise ValueError(f"{dataset} {error}") from error
    chosen, why = (task, "asked for by --task") if task else choose_task(fields)
    try:
        chosen.check()
    except ValueError as error:
        raise ValueError(f"{dataset}: {why}: {error}") from error
    golds = read_golds(chosen, fields, decimal_separator)
    problems = to_problems(kept, fields, golds)
    blank = sorted(set(range(1, len(table.rows) + 1)) - {problem.row for problem in problems})
    notes = [*table.notes, *describe_columns(question, answer)]
    notes += describe_chats(table.rows, question)
    notes += [*describe_instructions(fields.questions), *golds.notes]
    notes += unused_context(
        columns, question, [*answer, *(options if chosen is CHOICE_TASK else ())]
    )
    separator = golds.decimal_separator
    return Reading(dataset, split, problems, blank, separator, tuple(notes), chosen, why)


def take_procedural(
    dataset: str, split: str, table: Table, task: Task | None, named: bool
) -> Reading:
    """Return the problems of generators, whose gold answers are taken as they are.

    Raises:
        ValueError: columns were named.
    """
    if named:
        raise ValueError(
            f"{dataset} has no columns: leave --question-column and --answer-column out"
        )
    problems = [
        Problem(
            number,
            row["question"].strip(),
            row["answer"].strip(),
            write_solution(row),
            columns=row,
            source=row["answer"],
        )
        for number, row in enumerate(table.rows, start=1)
    ]
    chosen = task or REASONING_GYM
    why = "the generator's own scorer" if chosen is REASONING_GYM else "asked for by --task"
    return Reading(dataset, split, problems, [], "point", table.notes, chosen, why)


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
    """Set the first problem with a worked solution apart as the example, where one is wanted, or
    the first problem where none has one; repeats of its question go too."""
    if not wanted or not train:
        return train, None
    example = next((problem for problem in train if problem.solution), train[0])
    question = normalise(example.question)
    return [problem for problem in train if normalise(problem.question) != question], example
