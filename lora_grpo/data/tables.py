"""The rows of one data file: JSON in its usual shapes, CSV with any separator, Parquet or Arrow.

A path goes in; a row is a dictionary by column. A note says what a user may want to know of how the
file was read. Errors begin with the path.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import DataType

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SEPARATORS = (",", ";", "\t", "|")
ROWS_TO_GUESS_FROM = 200
# Under which key a JSON object usually holds its rows.
ROW_KEYS = ("data", "rows", "examples", "problems", "questions", "items", "records", "instances")
LFS_POINTER = b"version https://git-lfs"
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Table:
    """Rows by column, and a sentence for each thing about them that is not as usual."""

    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


def endings(path: Path) -> tuple[str, str]:
    """Return a file's ending and that of its compression, in lower case: `.jsonl` and `.gz`."""
    name = path.name.lower()
    packed = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def is_data_file(path: Path) -> bool:
    """Return whether a file's name has an ending that `read_file` reads."""
    return endings(path)[0] in READERS


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of chat turns, of OpenAI's shape or of ShareGPT's."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def read_text(path: Path) -> str:
    """Return a text file, unpacked, in UTF-8, or in UTF-16 where it begins with a byte order mark,
    as spreadsheets write it."""
    packed = endings(path)[1]
    try:
        with COMPRESSED.get(packed, open)(path, "rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no readable {packed} file ({error}): write it again") from None
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason}): convert it, or save it as `CSV UTF-8` "
            "from the spreadsheet"
        ) from None


def read_json(path: Path, split: str) -> Table:
    """Read JSON values one after another, such as one per line, or one that holds all rows."""
    text, decoder, values = read_text(path), json.JSONDecoder(), []
    start = SPACE.match(text).end()
    while start < len(text):
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            before = text[: error.pos]
            if "delimiter" in error.msg:  # it is missing after what stands before it
                before = before.rstrip()
            line = before.count("\n") + 1
            raise ValueError(
                f"{path}, line {line}: broken JSON ({error.msg}): mend that line"
            ) from None
        values.append(value)
        start = SPACE.match(text, end).end()
    return find_rows(path, values[0], split) if len(values) == 1 else Table(values)


def as_list(value: Any) -> Any:
    """Return a list that was written by number, `{"0": ..., "1": ...}` as pandas does, as one."""
    if isinstance(value, dict) and value and all(key.isdecimal() for key in value):
        return list(value.values())
    return value


def find_rows(path: Path, value: Any, split: str) -> Table:
    """Return the rows that one JSON value holds: a list of them, one under a key, or columns.

    Raises:
        ValueError: several keys hold rows, and none has the split's or a usual name.
    """
    value = as_list(value)
    if not isinstance(value, dict):
        return Table(value if isinstance(value, list) else [value])
    columns = {key: as_list(item) for key, item in value.items()}
    rows = columns_to_rows(columns)
    if rows is not None:
        return Table(rows, ("its keys are read as columns",))
    holders = [key for key, item in columns.items() if holds_rows(item)]
    holders = holders or [key for key, item in value.items() if leads_to_rows(item)]
    if not holders and have_a_key_in_common(value):
        return Table([*value.values()], ("its values are read as rows",))
    if not holders:
        return Table([value])
    key = next((key for key in (split, *ROW_KEYS) if key in holders), None)
    if key is None and len(holders) > 1:
        raise ValueError(
            f"{path} holds rows under {', '.join(holders)}: keep one of them, or call it data"
        )
    key = key or holders[0]
    found = find_rows(path, value[key], split)
    return Table(found.rows, (f"rows are read from its key {key}", *found.notes))


def columns_to_rows(columns: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of an object whose values are lists of one length, or that has pandas' keys
    `columns` and `data`; None of another one."""
    names, data = columns.get("columns"), columns.get("data")
    if isinstance(names, list) and isinstance(data, list):
        return [dict(zip(names, row, strict=False)) for row in data if isinstance(row, list)]
    lists = [column for column in columns.values() if isinstance(column, list)]
    if len(lists) < len(columns) or len({len(column) for column in lists}) != 1:
        return None
    if all(isinstance(item, dict) for column in lists for item in column):
        return None  # rows under each key
    if len(lists[0]) == 1 and any(map(is_chat, lists)):
        return None  # the fields of one row
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def holds_rows(value: Any) -> bool:
    """Return whether a value is a list of rows, or an object of columns."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(as_list(item), list) for item in value.values())
    rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    return rows and not is_chat(value)


def leads_to_rows(value: Any) -> bool:
    """Return whether an object holds several rows under one of its keys, or deeper."""
    return isinstance(value, dict) and any(
        leads_to_rows(item) or (isinstance(item, list) and len(item) > 1 and holds_rows(item))
        for item in value.values()
    )


def have_a_key_in_common(value: dict[str, Any]) -> bool:
    """Return whether the values are objects of one kind, as in `{"id1": {...}, "id2": {...}}`."""
    items = list(value.values())
    return (
        len(items) > 1
        and all(isinstance(item, dict) for item in items)
        and bool(set.intersection(*map(set, items)))
    )


def fit(text: str, separator: str) -> tuple[bool, float, int]:
    """Return how well a separator divides the first rows: whether at all, the share of rows as wide
    as the header, and the header's width."""
    records: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    with suppress(csv.Error):  # said when the rows are read
        records += islice(filter(None, reader), ROWS_TO_GUESS_FROM)
    widths = [len(record) for record in records] or [0]
    return widths[0] > 1, widths.count(widths[0]) / len(widths), widths[0]


def read_csv(path: Path, split: str) -> Table:
    """Read a text table whose first line names the columns; the separator is the one that divides
    header and rows alike.

    Raises:
        ValueError: broken text, a row wider than the header, or two columns of one name.
    """
    text = read_text(path)
    if text[:4].lower() == "sep=":  # Excel's own first line
        separator = text[4:5]
        text = text.partition("\n")[2]
    else:
        separator = max(SEPARATORS, key=lambda candidate: fit(text, candidate))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        twice = [name for name in names if name and names.count(name) > 1]
        if twice:
            raise ValueError(f"{path} has two columns named {twice[0]}: rename one")
        for row in reader:
            if any(map(str.strip, row.pop(None, ()))):
                raise ValueError(
                    f"{path}, line {reader.line_num}: more fields than the {len(names)} columns "
                    f"(separated by {separator!r}): quote a text that holds the separator, such as "
                    "a comma"
                )
            row.pop("", None)
            rows.append(row)
    except csv.Error as error:
        line = reader.reader.line_num
        raise ValueError(f"{path}, line {line}: broken CSV ({error}): mend that line") from None
    usual = separator in (",", "\t")
    return Table(rows, () if usual else (f"columns are separated by {separator!r}",))


def replace_float32(kind: "DataType", by: "DataType") -> "DataType":
    """Return an Arrow type with another in place of 32-bit floats, also inside of lists and
    structs."""
    import pyarrow

    if pyarrow.types.is_float32(kind):
        return by
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(replace_float32(kind.value_type, by))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([part.with_type(replace_float32(part.type, by)) for part in kind])
    return kind


def arrow_rows(table: "pyarrow.Table") -> list[dict[str, Any]]:
    """Return the rows of an Arrow table. A 32-bit float becomes the shortest decimal that rounds to
    it, 0.3 and not 0.30000001192092896, which Arrow writes when it makes text of it."""
    import pyarrow

    schemas = [
        pyarrow.schema([part.with_type(replace_float32(part.type, by)) for part in table.schema])
        for by in (pyarrow.string(), pyarrow.float64())
    ]
    if not schemas[0].equals(table.schema):
        table = table.cast(schemas[0]).cast(schemas[1])
    return table.to_pylist()


def read_arrow(path: Path) -> "pyarrow.Table":
    """Read an Arrow file: the stream that `datasets` writes, or Feather's format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()


def read_binary(path: Path, split: str) -> Table:
    """Read a Parquet or an Arrow file."""
    import pyarrow
    from pyarrow import parquet

    read = parquet.read_table if endings(path)[0] == ".parquet" else read_arrow
    try:
        return Table(arrow_rows(read(path)))
    except (pyarrow.ArrowException, OSError) as error:
        kind = endings(path)[0].removeprefix(".").capitalize()
        raise ValueError(f"{path} is no readable {kind} file ({error}): write it again") from None


BINARY = (".parquet", ".arrow", ".feather")
READERS: dict[str, Callable[[Path, str], Table]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json),
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_csv),
    **dict.fromkeys(BINARY, read_binary),
}


def read_file(path: Path, split: str = "train") -> Table:
    """Read the rows of a local file; `split` chooses where a JSON object holds several.

    Raises:
        ValueError: an unknown ending, broken text, a row that is not an object, or no rows.
    """
    ending, packed = endings(path)
    if ending not in READERS or (packed and ending in BINARY):
        raise ValueError(
            f"{path} must end in {', '.join(READERS)}, the text formats also with .gz, .bz2 or "
            f".xz, got {path.suffix or 'no ending'}: save a spreadsheet as CSV"
        )
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer and not the data: run `git lfs pull` in its folder"
            )
    table = READERS[ending](path, split)
    if not table.rows:
        raise ValueError(f"{path} is empty: it must hold a row for each problem")
    rows = [{"messages": row} if is_chat(row) else row for row in table.rows]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: expected an object with named columns, got {row!r:.60}"
            )
    return Table(rows, table.notes)
