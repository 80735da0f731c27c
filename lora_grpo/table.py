"""Where rows come from: a local file or folder, the Hub, or the built-in arithmetic.

A dataset's name and a split go in; rows as dictionaries by column come out. Errors begin with the
file or the name that they are about.
"""

import csv
import json
from pathlib import Path
from typing import Any

from lora_grpo.arithmetic import generate_problems

BUILT_IN = "arithmetic"
BUILT_IN_ROWS = {"train": 4000, "validation": 256, "test": 512}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_SECONDS = 10


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON value a line; blank lines are passed over."""
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: broken JSON ({error.msg}): mend that line"
                    ) from None
    return rows


def read_json(path: Path) -> list[Any]:
    """Read a JSON file that holds a list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg}): mend that line"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds a {type(rows).__name__}: a .json file must hold a list of objects"
        )
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file whose first line names the columns."""
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: more fields than the "
                        f"{len(reader.fieldnames)} columns: quote a text that holds a comma"
                    )
                rows.append(row)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.reader.line_num}: broken CSV ({error}): mend that line"
            ) from None
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}): write it again") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def find_in_folder(folder: Path, split: str) -> Path:
    """Return the folder's one file for a split, such as `train.jsonl` or `train-00000.parquet`."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    named = [path for path in files if path.stem.split("-")[0] == split]
    if len(named) != 1:
        found = ", ".join(path.name for path in files) or "no data files"
        raise FileNotFoundError(
            f"{folder} must hold one {split}{'|'.join(SUFFIXES)} file, found {found}: add it, or "
            "give the path of a file"
        )
    return named[0]


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a local file.

    Raises:
        ValueError: an unknown ending, broken text, a row that is not an object, or no rows.
    """
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'}"
        )
    try:
        rows = READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None
    if not rows:
        raise ValueError(f"{path} is empty: it must hold a row for each problem")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: expected an object with named columns, got {row!r:.60}"
            )
    return rows


def hub_answers(repository: str) -> bool:
    """Tell whether the Hub can be reached; `datasets` would retry for half a minute to find out."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return True
    except (httpx.HTTPError, OSError):
        return False
    return True


def read_hub(name: str, split: str) -> list[dict[str, Any]]:
    """Read one split of a Hub dataset, `owner/name` or `owner/name:config`; from the cache where
    the Hub cannot be reached."""
    import datasets
    import httpx

    repository, _, config = name.partition(":")
    datasets.disable_progress_bars()
    try:
        datasets.config.HF_HUB_OFFLINE |= not hub_answers(repository)
        return datasets.load_dataset(repository, config or None, split=split).to_list()
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        httpx.HTTPError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{name} is no local file, and the Hub did not give its {split} split ({reason}): give "
            "the path of a local file, or use --preset tiny, which needs no network"
        ) from error


def read_rows(dataset: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a dataset by the kind of its name."""
    if dataset == BUILT_IN:
        return generate_problems(BUILT_IN_ROWS.get(split, 0), split)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return read_file(find_in_folder(path, split))
    if path.is_file():
        return read_file(path)
    if path.suffix in SUFFIXES or dataset.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{dataset} does not exist: check the path (relative to {Path.cwd()})"
        )
    return read_hub(dataset, split)
