"""The splits of procedural problems: drawn from the generators of the `reasoning-gym` package.

Training and test problems are drawn from different seeds, and a hash of the question decides which
of the two it may stand in: however small a generator's space, no test question is trained on,
whatever the seed, and whichever settings are trained on and tested.
"""

import functools
import hashlib
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lora_grpo.data.tables import Table
from lora_grpo.tasks.reasoning_gym import (
    BLOCK,
    NONSENSE,
    SEEDS,
    Generator,
    make_entry,
    read_generators,
    score,
)

SPLITS = ("train", "test")
# Draws per seed; the test's begin behind those of all seeds.
MOST_DRAWS = 10**6
TEST_BEGIN = SEEDS * MOST_DRAWS
TEST_SHARE = 10
# After so many draws without a new question, there is none.
PATIENCE = 1000
# Rows on which the scorer is tried; and how long drawing may take before that is said.
TRIED, PATIENT_SECONDS = 20, 20.0


def as_compared(question: str) -> str:
    return " ".join(question.split()).lower()


def split_of(question: str) -> str:
    """Return the one split that a question may stand in: a tenth of all are for the test."""
    digest = hashlib.sha256(as_compared(question).encode()).digest()
    return "train" if digest[0] % TEST_SHARE else "test"


def draw_entries(generator: Generator, split: str) -> Iterator[dict[str, Any]]:
    """Yield the different problems of a split as rows, until there are no more."""
    begin = TEST_BEGIN if split == "test" else generator.seed * MOST_DRAWS
    seen: set[str] = set()
    last = 0
    for draw in range(MOST_DRAWS):
        block, index = divmod(draw, BLOCK)
        place = {"generator": generator.text, "seed": begin + block * BLOCK, "index": index}
        entry = make_entry(generator.text, place["seed"], index)
        question = as_compared(entry["question"])
        if question not in seen:
            seen.add(question)
            last = draw
            if split_of(question) == split:
                yield {**entry, **place}
        elif draw - last >= PATIENCE:
            return


def draw_rows(generator: Generator, split: str) -> list[dict[str, Any]]:
    """Return as many rows of a split as the generator was asked for, or all that it has.

    Raises:
        ValueError: it has none, or its scorer cannot teach anything.
    """
    wanted = generator.test_size if split == "test" else generator.size
    started = time.perf_counter()
    entries = draw_entries(generator, split)
    rows = list(islice(entries, min(TRIED, wanted)))
    check_scorer(generator, rows)
    seconds = (time.perf_counter() - started) / max(1, len(rows)) * wanted
    if seconds > PATIENT_SECONDS:
        print(
            f"{generator.name}: drawing {wanted:,} {split} problems takes about {seconds:.0f} s: "
            "its settings size and test_size say how many",
            file=sys.stderr,
        )
    rows += islice(entries, wanted - len(rows))
    if not rows:
        raise ValueError(
            f"{generator.name}: there are too few different questions for a {split} split: change "
            "the settings"
        )
    return rows


def check_scorer(generator: Generator, rows: list[dict[str, Any]]) -> None:
    """Refuse a generator without gold answers, or whose scorer pays nonsense in full.

    Raises:
        ValueError: it is one.
    """
    if any(row["answer"] is None for row in rows):
        raise ValueError(f"{generator.name} gives no gold answers: choose another")
    for row in rows:
        for answer in NONSENSE:
            if score(answer, row) >= 1:
                raise ValueError(
                    f"{generator.name} cannot be trained on, since its own scorer pays the answer "
                    f"{answer!r} in full where {row['answer']!r:.40} is right: choose another"
                )


def describe_sizes(generator: Generator, rows: list[dict[str, Any]], split: str) -> list[str]:
    """Return a note where a generator has fewer different questions than were asked for."""
    wanted = generator.test_size if split == "test" else generator.size
    if len(rows) == wanted:
        return []
    return [
        f"{generator.name} has only {len(rows):,} different {split} questions with these settings, "
        f"{wanted:,} were asked for"
    ]


def write_solution(row: dict[str, Any]) -> str:
    """Return what a worked example shows as the reasoning: the expression with its result, if the
    problem is one, else that the answer is the answer. The generators give no worked solutions."""
    expression, answer = row["metadata"].get("expression"), row["answer"].strip()
    if isinstance(expression, str) and expression != answer:
        return f"{expression} = {answer}"
    return f"The answer is {answer}."


@functools.lru_cache(maxsize=4)
def read_procedural(dataset: str, split: str) -> Table:
    """Return the problems of a split, the generators' mixed in proportion to their sizes.

    Raises:
        ValueError: an unknown generator or setting, or one that cannot be trained on.
    """
    try:
        by_generator = [(g, draw_rows(g, split)) for g in read_generators(dataset)]
    except ValueError as error:
        raise ValueError(f"{dataset}: {error}") from error
    ranked = [
        ((position + 0.5) / len(rows), number, row)
        for number, (_, rows) in enumerate(by_generator)
        for position, row in enumerate(rows)
    ]
    rows = [row for *_, row in sorted(ranked, key=lambda item: item[:2])]
    notes = [note for g, drawn in by_generator for note in describe_sizes(g, drawn, split)]
    return Table(rows, tuple(notes))
