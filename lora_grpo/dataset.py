"""Where problems come from: the Hub, a local file or folder, or the built-in arithmetic; questions
with gold answers.

A dataset's name and a split go in; a list of `Problem` comes out, the gold answer already taken
from its field.
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.arithmetic import generate_problems

BUILT_IN = "arithmetic"
BUILT_IN_ROWS = {"train": 4000, "validation": 256, "test": 512}
QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "solution")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Problem:
    """One question and its gold answer; `row` counts from 1 as an editor does, `solution` is the
    worked text if any."""

    row: int
    question: str
    answer: str
    solution: str | None = None


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON value a line; blank lines are passed over."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"--dataset {path}, line {number}: broken JSON ({error.msg}): mend that line"
                ) from None
    return rows


def read_json(path: Path) -> list[Any]:
    """Read a JSON file that holds a list of objects."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8") or "[]")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--dataset {path}, line {error.lineno}: broken JSON ({error.msg}): mend that line"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(
            f"--dataset {path} holds a {type(rows).__name__}: a .json file must hold a list of "
            "objects"
        )
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file whose first line names the columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"--dataset {path} is no readable Parquet file ({error}): write it again"
        ) from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def find_in_folder(folder: Path, split: str) -> Path:
    """Return the folder's one file for a split, such as `train.jsonl` or `train-00000.parquet`."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    named = [path for path in files if path.stem.split("-")[0] == split]
    if len(named) != 1:
        found = ", ".join(path.name for path in files) or "no data files"
        raise FileNotFoundError(
            f"--dataset {folder} must hold one {split}{'|'.join(SUFFIXES)} file, found {found}"
        )
    return named[0]


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a local file.

    Raises:
        ValueError: an unknown ending, broken text, a row that is not an object, or no rows.
    """
    if path.suffix not in READERS:
        raise ValueError(
            f"--dataset {path} must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'}"
        )
    try:
        rows = READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--dataset {path} is not UTF-8 text (byte {error.start}): convert it"
        ) from None
    if not rows:
        raise ValueError(f"--dataset {path} is empty: it must hold a row for each problem")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"--dataset {path}, row {number}: expected an object with named columns, got "
                f"{row!r:.60}"
            )
    return rows


def read_hub(name: str, split: str) -> list[dict[str, Any]]:
    """Read one split of a Hub dataset, `owner/name` or `owner/name:config`."""
    import datasets

    repository, _, config = name.partition(":")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(repository, config or None, split=split).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"--dataset {name} is no local file, and the Hub did not give its {split} split "
            f"({reason}): "
            "give the path of a local file, or use --preset tiny, which needs no network"
        ) from error


def read_rows(dataset: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a dataset by the kind of its name."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return read_file(find_in_folder(path, split))
    if path.is_file():
        return read_file(path)
    if path.suffix in SUFFIXES or dataset.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"--dataset {dataset} does not exist: check the path (relative to {Path.cwd()})"
        )
    return read_hub(dataset, split)


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
        f"no column {' or '.join(wanted)} among {', '.join(map(str, columns))}: name one by {flag}"
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


def as_problem(number: int, question: Any, field: Any) -> Problem | None:
    """Return a problem, or None where the question or the answer is missing."""
    if question is None or field is None or not str(question).strip() or not str(field).strip():
        return None
    text = str(field)
    answer = extract_gold(text)
    solution = text.rpartition("####")[0].strip() if "####" in text else None
    return Problem(number, str(question).strip(), answer, solution or None)


def to_problems(
    rows: Iterable[dict[str, Any]], question_column: str, answer_column: str
) -> list[Problem]:
    """Return the rows that have both a question and an answer."""
    numbered = enumerate(rows, start=1)
    found = (
        as_problem(number, row.get(question_column), row.get(answer_column))
        for number, row in numbered
    )
    return [problem for problem in found if problem is not None]


def load_problems(
    dataset: str,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """Return the problems of a dataset.

    Raises:
        FileNotFoundError: no such file or Hub dataset.
        ValueError: broken or empty data, or a column that is not there.
    """
    if dataset == BUILT_IN:
        rows: list[dict[str, Any]] = list(generate_problems(BUILT_IN_ROWS[split], split))
    else:
        rows = read_rows(dataset, split)
    question = find_column(rows, question_column, QUESTION_COLUMNS, "--question-column")
    answer = find_column(rows, answer_column, ANSWER_COLUMNS, "--answer-column")
    problems = to_problems(rows, question, answer)
    if not problems:
        raise ValueError(
            f"--dataset {dataset} has no usable rows: {question} or {answer} is empty in each"
        )
    return problems
