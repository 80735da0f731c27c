"""Files of many shapes, each read as the rows that were written."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_grpo.data.tables import is_data_file, read_file

ROWS = [{"question": f"What is {n} and 1?", "answer": str(n + 1)} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
SHARED = Path(__file__).parents[3] / "shared" / "cases" / "data"


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.ndjson", "a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),  # as jq prints them
        "\ufeff\n  \n" + LINES.replace("\n", "\r\n\r\n").strip(),
        json.dumps({"version": "1", "data": ROWS}),
        json.dumps({"train": ROWS, "test": ROWS[:1]}),
        json.dumps({"name": "x", "my_rows": ROWS}),
        json.dumps({"data": COLUMNS}),
        json.dumps({"status": "ok", "result": {"count": 3, "page": {"items": ROWS}}}),
        json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}),
        json.dumps(COLUMNS),
        json.dumps({name: dict(enumerate(column)) for name, column in COLUMNS.items()}),
        json.dumps(dict(enumerate(ROWS))),
        json.dumps({"columns": [*COLUMNS], "index": [0], "data": [[*r.values()] for r in ROWS]}),
    ],
)
def test_json_holds_rows_in_any_of_its_usual_shapes(tmp_path: Path, name: str, text: str) -> None:
    assert read_file(write(tmp_path / name, text)).rows == ROWS


def test_the_key_that_held_the_rows_is_said(tmp_path: Path) -> None:
    [note] = read_file(write(tmp_path / "a.json", json.dumps({"v": 1, "items": ROWS}))).notes
    assert "items" in note
    assert read_file(write(tmp_path / "b.json", json.dumps(ROWS))).notes == ()


def test_the_split_chooses_between_the_keys_of_one_object(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert (len(read_file(path).rows), len(read_file(path, "test").rows)) == (3, 1)


def test_a_column_of_objects_among_others_is_a_column(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": row["question"]}] for row in ROWS]
    truths = [{"ground_truth": row["answer"]} for row in ROWS]
    path = write(tmp_path / "a.json", json.dumps({"prompt": chats, "reward_model": truths}))
    assert [row["reward_model"] for row in read_file(path).rows] == truths


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "1"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}]},
        {"prompt": [{"role": "user", "content": "q"}], "answer": ["1"]},
    ],
)
def test_one_row_is_one_row(tmp_path: Path, row: dict) -> None:
    assert read_file(write(tmp_path / "a.jsonl", json.dumps(row))).rows == [row]


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (['{"a": 1}', "", '{"a": 2', '{"a": 3}'], 3),  # the comma is missed in line 4
        (['{"a": 1}', "{'a': 2}"], 2),
        (["[", '{"a": 1}', '{"a": 2}', "]"], 2),
        (["[", '{"a": 1},', "oops", "]"], 3),
    ],
)
def test_broken_json_is_named_by_the_line_to_mend(
    tmp_path: Path, lines: list[str], line: int
) -> None:
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {line}: broken JSON"):
        read_file(write(tmp_path / "a.jsonl", "\n".join(lines)))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.txt"])
def test_any_separator_and_encoding_of_a_spreadsheet(
    tmp_path: Path, separator: str, encoding: str, name: str
) -> None:
    question = "Wie viel? Eins; zwei, drei|\tgr\u00fcn?"
    text = (
        f'\u00a0question {separator} answer{separator}\r\n"{question}"{separator}1{separator}\r\n'
    )
    [row] = read_file(write(tmp_path / name, text.encode(encoding))).rows
    assert row == {"question": question, "answer": "1"}


def test_the_separator_is_the_one_that_all_rows_have(tmp_path: Path) -> None:
    text = "question (a, b);answer\nOne, two, three?;0,5\nOne?;1\n"
    table = read_file(write(tmp_path / "a.csv", text))
    assert table.rows[0] == {"question (a, b)": "One, two, three?", "answer": "0,5"}
    assert "';'" in table.notes[0]
    sep = read_file(write(tmp_path / "b.csv", "sep=|\nquestion|answer\na;b|1\n"))
    assert sep.rows == [{"question": "a;b", "answer": "1"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        *[(f"a.{kind}", b"\xef\xbb\xbf\n", "is empty") for kind in ("jsonl", "json", "csv")],
        *[("a.json", b"[]", "is empty"), ("a.csv", b"question,answer\n", "is empty")],
        *[(f"a.{kind}", b'question,"\xe9"', "is not UTF-8 text") for kind in ("jsonl", "csv")],
        ("a.json", b'{"train": []}', "is empty"),
        ("a.json", b'{"left": [{"a": 1}], "right": [{"a": 1}]}', "rows under left, right"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"row 2: .*\[1, 2\]"),
        ("a.csv", b"question,answer, answer\nq,1,2\n", "two columns named answer"),
        ("a.csv", b'q,a\n"two\nlines",3\n1,000 + 1?,1\n', "line 4: more fields than the 2 columns"),
        ("a.csv", b"q,a\n" + b"x" * 200_000 + b",1\n", "line 2: broken CSV .field larger"),
        ("a.csv", b'q,a\na,1\n"never closed,2\nb,3\n', "line 4: broken CSV .unexpected end"),
        *[("a.parquet", data, "no readable Parquet file") for data in (b"no parquet at all", b"")],
        ("a.xlsx", b"x", r"must end in \.jsonl.*\.xlsx: save a spreadsheet as CSV"),
        ("a", b"x", "no ending"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path / name}.*{message}") as caught:
        read_file(write(tmp_path / name, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)]
)
def test_compressed_text(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    assert read_file(write(tmp_path / f"a.jsonl{ending}", pack(LINES.encode()))).rows == ROWS
    broken = write(tmp_path / f"b.jsonl{ending}", pack(LINES.encode())[:-12])
    with pytest.raises(ValueError, match=rf"b\.jsonl{ending} is no readable {ending.lower()} file"):
        read_file(broken)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            read_file(write(tmp_path / name, pointer))


def test_a_32_bit_float_is_the_shortest_decimal_of_it(tmp_path: Path) -> None:
    import numpy
    import pyarrow
    from pyarrow import parquet

    tenths = [n / 10 for n in range(1, 60)] + [2.0107e-6, 16777216.0]
    floats = pyarrow.array(tenths, pyarrow.float32())
    lists = pyarrow.array([[value] for value in tenths], pyarrow.list_(pyarrow.float32()))
    table = pyarrow.table({"answer": floats, "more": lists, "double": pyarrow.array(tenths)})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_file(tmp_path / "a.parquet").rows
    assert [row["answer"] for row in rows] == tenths == [row["more"][0] for row in rows]
    assert [row["double"] for row in rows] == tenths
    assert all(
        numpy.float32(row["answer"]) == value.as_py()
        for row, value in zip(rows, floats, strict=True)
    )


def test_arrow_files_of_both_kinds(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import ipc

    table = pyarrow.Table.from_pylist(ROWS)
    for name, new in (("a.arrow", ipc.new_stream), ("b.feather", ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert read_file(tmp_path / name).rows == ROWS


def test_what_counts_as_a_data_file() -> None:
    assert all(is_data_file(Path(name)) for name in ("a.JSONL", "a.csv.gz", "a.b.parquet"))
    assert not any(is_data_file(Path(name)) for name in ("a.md", "jsonl", "owner/name.1", "a.gz"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the cases in ../shared/cases")
def test_the_shared_float32_case() -> None:
    values = [row["answer"] for row in read_file(SHARED / "float32.parquet").rows]
    assert values[:3] == [0.1, 0.2, 0.3]
