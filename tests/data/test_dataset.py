import csv
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from lora_grpo.data.gold import extract_gold
from lora_grpo.data.problems import Problem, load_problems, read_problems

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "gsm8k"
WORKED = "48/2=24\n48+24=72\n#### 72"
ROWS = [
    {"question": "How many clips?", "answer": WORKED},
    {"question": 'Quotes ", commas, and\na line break', "answer": "3.5"},
    {"question": "Unicode line ends \u2028 \u2029 \x85 \x0b \x0c \x1c stay inside", "answer": "-4"},
]
PROBLEMS = [
    Problem(1, "How many clips?", "72", "48/2=24\n48+24=72"),
    Problem(2, 'Quotes ", commas, and\na line break', "3.5"),
    Problem(3, ROWS[2]["question"], "-4"),
]


def to_jsonl(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_any(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".csv":
        return write_csv(path, rows)
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    return write(path, to_jsonl(rows) if path.suffix == ".jsonl" else json.dumps(rows))


# What is read


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_each_kind_of_file_gives_the_same_problems(tmp_path: Path, name: str) -> None:
    assert load_problems(write_any(tmp_path / name, ROWS)) == PROBLEMS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path, name: str) -> None:
    plain = Path(write_any(tmp_path / f"plain-{name}", ROWS[:1])).read_text(encoding="utf-8")
    text = plain.replace("\r\n", "\n").replace("\n", "\r\n")
    path = write(tmp_path / name, text, "utf-8-sig")
    [problem] = load_problems(path)
    assert (problem.question, problem.answer) == ("How many clips?", "72")


def test_rows_are_those_that_json_reads_line_by_line(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = "\n\n".join([lines[0], "  ", *lines[1:]])  # blank lines, no line end at the end
    problems = load_problems(write(tmp_path / "a.jsonl", text))
    expected = [json.loads(line) for line in text.split("\n") if line.strip()]
    assert [problem.question for problem in problems] == [row["question"] for row in expected]
    assert [problem.row for problem in problems] == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "answer"),
    [(42, "42"), (3.5, "3.5"), (-7, "-7"), (0, "0"), ("  8 ", "8"), (10**20, "1" + "0" * 20)],
)
def test_answers_may_be_numbers(tmp_path: Path, field: object, answer: str) -> None:
    rows = [{"question": "q", "answer": field}]
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert load_problems(write_any(tmp_path / name, rows))[0].answer == answer


def test_parquet_s_own_numbers_are_read(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": Decimal("3.50")}]
    assert load_problems(write_parquet(tmp_path / "a.parquet", rows))[0].answer == "3.50"


def test_a_folder_gives_each_split_its_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", to_jsonl(ROWS))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ROWS[:1])
    write(tmp_path / "README.md", "no data")
    assert load_problems(str(tmp_path), "train") == PROBLEMS
    assert load_problems(str(tmp_path), "test") == PROBLEMS[:1]


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", to_jsonl(ROWS))
    assert load_problems("~/a.jsonl") == PROBLEMS


def test_the_built_in_problems_need_no_file() -> None:
    train, test = load_problems("arithmetic"), load_problems("arithmetic", "test")
    assert (len(train), len(test)) == (4000, 512)
    assert all(problem.solution.endswith(f"={problem.answer}") for problem in test)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        load_problems("arithmetic", "dev")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the real GSM8K in ../shared/gsm8k")
def test_the_real_gsm8k_has_its_published_number_of_rows() -> None:
    train, test = load_problems(str(GSM8K), "train"), load_problems(str(GSM8K), "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert (train[0].answer, test[0].answer) == ("72", "18")
    assert [sum("," in problem.answer for problem in part) for part in (train, test)] == [79, 14]
    assert [sum(problem.answer[0] == "-" for problem in part) for part in (train, test)] == [3, 2]
    assert all(problem.solution and "####" not in problem.solution for problem in train)


# Columns


@pytest.mark.parametrize("question", ["question", "problem", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "solution"])
def test_the_usual_columns_are_found(tmp_path: Path, question: str, answer: str) -> None:
    path = write(tmp_path / "a.jsonl", to_jsonl([{"id": 9, answer: "5", question: "q"}]))
    assert load_problems(path) == [Problem(1, "q", "5")]


def test_named_columns_win_over_the_usual_ones(tmp_path: Path) -> None:
    row = {"question": "no", "answer": "0", "ask": "yes", "gold": "1"}
    path = write(tmp_path / "a.jsonl", to_jsonl([row]))
    assert load_problems(path) == [Problem(1, "no", "0")]
    named = load_problems(path, question_column="ask", answer_column="gold")
    assert named == [Problem(1, "yes", "1")]


def test_rows_without_a_question_or_an_answer_are_left_out_and_named(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": ""},
        {"question": "q", "answer": "1"},
        {"question": "  ", "answer": "1"},
        {"question": "q"},
        {"question": None, "answer": "1"},
        {"question": "r", "answer": 0},
    ]
    path = write(tmp_path / "a.jsonl", to_jsonl(rows))
    reading = read_problems(path)
    assert reading.problems == [Problem(2, "q", "1"), Problem(6, "r", "0")]
    assert reading.blank == [1, 3, 4, 5]
    assert load_problems(path) == reading.problems


# The gold answer


@pytest.mark.parametrize(
    ("field", "gold"),
    [
        (WORKED, "72"),
        ("#### 1,200", "1,200"),
        ("#### 1 was wrong\n####  2 ", "2"),
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1}, no, \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a{b}{c{d}}e} f}", "a{b}{c{d}}e"),
        (r"\boxed{3} then #### 4", "4"),
        (r"cut \boxed{3", r"cut \boxed{3"),
        (" 12 ", "12"),
    ],
)
def test_the_gold_answer_is_taken_from_its_field(field: str, gold: str) -> None:
    assert extract_gold(field) == gold


# Errors, each with its sentence


def refuse(path: object, *parts: str, **options: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        read_problems(str(path), **options)
    message = str(caught.value)
    assert message.startswith("--dataset ")
    assert str(path) in message and "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    refuse("gone.jsonl", "does not exist", str(Path.cwd()))
    refuse(tmp_path / "no" / "folder", "does not exist")


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_an_empty_file(tmp_path: Path, name: str, text: str) -> None:
    refuse(write(tmp_path / name, text), "is empty")


def test_a_file_of_no_rows(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.json", "[]"), "is empty")
    refuse(write(tmp_path / "a.csv", "question,answer\n"), "is empty")


def test_broken_json_is_named_by_its_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    refuse(write(tmp_path / "a.jsonl", f"{good}\n\n{good[:-5]}\n{good}\n"), "line 3: broken JSON")
    refuse(write(tmp_path / "a.json", f"[\n{good},\n{good[:-5]}\n]"), "line 3: broken JSON")


def test_json_of_another_shape(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.json", '{"train": []}'), "is empty")
    two = '{"left": [{"question": "q"}], "right": [{"question": "q"}]}'
    refuse(write(tmp_path / "b.json", two), "holds rows under left, right")
    refuse(write(tmp_path / "a.jsonl", '{"question": "q"}\n[1, 2]\n'), "row 2", "[1, 2]")


def test_broken_csv_is_named_by_its_line(tmp_path: Path) -> None:
    text = 'question,answer\n"two\nlines",3\nHow much is 1,000 + 1?,1001\n'
    refuse(write(tmp_path / "a.csv", text), "line 4: more fields than the 2 columns", "comma")
    text = f"question,answer\n{'x' * 200_000},1\n"
    refuse(write(tmp_path / "b.csv", text), "line 2: broken CSV (field larger")
    text = 'question,answer\na,1\n"never closed,2\nb,3\n'
    refuse(write(tmp_path / "c.csv", text), "line 4: broken CSV (unexpected end of data)")


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.parquet", "no parquet at all"), "is no readable Parquet file")
    refuse(write(tmp_path / "b.parquet", ""), "is no readable Parquet file")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_is_not_utf_8(tmp_path: Path, name: str) -> None:
    text = write_any(tmp_path / name, [{"question": "q", "answer": "1"}])
    Path(text).write_bytes(Path(text).read_bytes().replace(b"q", b"\xe9"))
    refuse(text, "is not UTF-8 text")


def test_an_unknown_ending(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.xlsx", "x"), "must end in .jsonl", ".xlsx", "CSV")
    refuse(write(tmp_path / "a", "x"), "no ending")


def test_a_missing_column_is_told_which_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "x", "answer": "1"}\n{"ask": "x"}\n')
    there = "among q, answer, ask"
    refuse(path, "no column for the question", there, "--question-column")
    refuse(path, "no column text", there, question_column="text")
    refuse(path, "no column gold", "--answer-column", question_column="q", answer_column="gold")


def test_no_usable_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "", "answer": "1"}\n')
    refuse(path, "no usable rows", "question or answer is empty")


def test_a_folder_without_the_split_or_with_two_files_for_it(tmp_path: Path) -> None:
    refuse(tmp_path, "one train file", ".jsonl", "found no data files")
    write(tmp_path / "train.jsonl", to_jsonl(ROWS))
    write(tmp_path / "validation.jsonl", to_jsonl(ROWS))
    refuse(tmp_path, "one dev file", "found train.jsonl, validation.jsonl", split="dev")
    write(tmp_path / "train.csv", "question,answer\nq,1\n")
    refuse(tmp_path, "found train.csv, train.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"question": {"text": "q", "more": {}}, "answer": {"a": "1", "b": "2"}},
        {"question": {"a": "q", "b": "r"}, "answer": "1"},
    ],
)
def test_structures_are_refused_rather_than_printed_as_python(tmp_path: Path, row: dict) -> None:
    path = write(tmp_path / "a.jsonl", to_jsonl([row]))
    refuse(path, "row 1", "got a dict", "--question-column")


def test_half_a_character_is_refused_as_no_tokenizer_takes_it(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl", '{"question": "\\ud83d\\ude00", "answer": "1"}')
    assert load_problems(whole)[0].question == "\U0001f600"
    half = write(tmp_path / "b.jsonl", '{"question": "\\ud83d", "answer": "1"}')
    refuse(half, "row 1: question holds half a character")


def test_errors_name_the_flag_that_gave_the_dataset(tmp_path: Path) -> None:
    for path in ("gone.jsonl", write(tmp_path / "a.jsonl", '{"a": 1}')):
        with pytest.raises((FileNotFoundError, ValueError), match=f"^--eval-dataset {path} "):
            read_problems(path, flag="--eval-dataset")


# The Hub

OFFLINE = """
import json, os, time
from pathlib import Path

from datasets import DatasetInfo
from datasets.arrow_writer import ArrowWriter

from lora_grpo.data.problems import load_problems

cached = Path(os.environ["HF_DATASETS_CACHE"]) / "owner___name" / "main" / "0.0.0" / "abc"
cached.mkdir(parents=True)
writer = ArrowWriter(path=str(cached / "name-train.arrow"))
writer.write({"question": "q", "answer": "#### 3"})
writer.finalize()
DatasetInfo(
    features=writer._features, builder_name="parquet", dataset_name="name", config_name="main",
    version="0.0.0", splits={"train": {"name": "train", "num_examples": 1, "dataset_name": "name"}},
).write_to_directory(str(cached))

errors, started = [], time.perf_counter()
for name in ("openai/gsm8k:main", "nosuchset", "a b", "data/folder/that/is/not"):
    try:
        load_problems(name)
    except FileNotFoundError as error:
        errors.append(str(error))
seconds = time.perf_counter() - started
print(json.dumps([errors, seconds, load_problems("owner/name:main")[0].answer]))
"""


def test_a_hub_that_cannot_be_reached_is_said_at_once_and_the_cache_still_serves(
    tmp_path: Path,
) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    path = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, **nobody, **path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    errors, seconds, cached = json.loads(done.stdout)
    assert len(errors) == 4 and cached == "3"
    assert seconds < 15  # `datasets` alone takes 25 for each that it can ask the Hub for
    assert errors[0].startswith("--dataset openai/gsm8k:main is no local file")
    assert "the Hub cannot be reached" in errors[0] and "Offline" not in errors[0]
    for error in errors:
        assert "path of a local file" in error and "arithmetic" in error
        assert "\n" not in error
    assert "Retrying" not in done.stderr and "Traceback" not in done.stderr
