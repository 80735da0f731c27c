import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_grpo.machine.files import (
    append_jsonl,
    read_jsonl,
    staged_directory,
    write_json,
    write_jsonl,
    write_text,
)

ROOT = Path(__file__).parents[2]
AWKWARD = {"text": 'caf\u00e9 \U0001f600 \u2028 \u2029 \x85 \x0b \x0c \x1c \r\n "quoted"', "n": 0.1}


def crash(*_: object) -> None:
    raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Files


def test_a_file_is_written_with_its_folders_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "first, and longer")
    write_text(path, "second \u00e9")
    assert path.read_bytes() == "second \u00e9".encode()
    assert names(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("stage", ["fsync", "chmod", "replace"])
def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"step": 1})
    monkeypatch.setattr(f"lora_grpo.machine.files.os.{stage}", crash)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert names(tmp_path) == ["a.json"]


def test_the_new_text_is_whole_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "a.txt", []
    write_text(path, "old")
    replace = os.replace

    def spy(source: str, target: Path) -> None:
        seen.append((Path(source).read_text(), Path(target).read_text(), Path(source).parent))
        replace(source, target)

    monkeypatch.setattr("lora_grpo.machine.files.os.replace", spy)
    write_text(path, "new")
    assert seen == [("new", "old", tmp_path)]
    assert path.read_text() == "new"


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"step": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"step": 2}, {"step": object()}])
    assert read_jsonl(path) == [{"step": 1}]


def test_json_is_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", AWKWARD)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == AWKWARD
    assert "\u00e9" in text and text.startswith('{\n  "text"') and text.endswith("}\n")


def test_no_encoding_is_left_to_the_locale(tmp_path: Path) -> None:
    """Python itself watches each `open`."""
    code = (
        "import sys; from pathlib import Path; from lora_grpo.machine.files import *\n"
        "path = Path(sys.argv[1]) / 'a.jsonl'; row = {'text': '\\u2192'}\n"
        "write_jsonl(path, [row]); append_jsonl(path, [row]); assert read_jsonl(path) == [row, row]"
    )
    watched = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    subprocess.run(
        [sys.executable, *watched, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60
    )


# Lines


def test_rows_come_back_as_they_went_whatever_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"step": 1, **AWKWARD}, {"step": 2}]
    write_jsonl(path, rows)
    append_jsonl(path, [{"step": 3, **AWKWARD}])
    assert read_jsonl(path) == [*rows, {"step": 3, **AWKWARD}]
    assert path.read_bytes().count(b"\n") == 3


def test_a_last_line_cut_at_any_byte_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"step": 1, "text": "\u00e9\U0001f600"}, {"step": 2, "text": "\u00e9\U0001f600"}]
    write_jsonl(path, rows)
    whole = path.read_bytes()
    first_ends = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_jsonl(path) == (rows[:1] if length >= first_ends else [])


def test_no_file_and_an_empty_one_hold_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "gone.jsonl") == []
    write_jsonl(tmp_path / "a.jsonl", [])
    assert read_jsonl(tmp_path / "a.jsonl") == []


def test_a_broken_line_in_the_middle_is_no_cut_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2"):
        read_jsonl(tmp_path / "a.jsonl")


# Folders


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "mine"
    with staged_directory(target) as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "a.txt").write_text("x")
        assert not target.exists() and staged.parent == target.parent
    assert (target / "inner" / "a.txt").read_text() == "x"
    assert names(target.parent) == ["mine"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_vanishes_when_its_making_fails(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), staged_directory(tmp_path / "mine") as staged:
        (staged / "half.txt").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_a_folder_that_is_there_is_never_touched(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "a.txt").write_text("precious")
    with (
        pytest.raises(FileExistsError, match="mine exists already and is never overwritten"),
        staged_directory(target),
    ):
        pytest.fail("the block must not run")
    assert (target / "a.txt").read_text() == "precious" and names(tmp_path) == ["mine"]


def test_a_folder_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    with pytest.raises(OSError), staged_directory(target) as staged:
        (staged / "a.txt").write_text("ours")
        target.mkdir()
        (target / "a.txt").write_text("theirs")
    assert (target / "a.txt").read_text() == "theirs" and names(tmp_path) == ["mine"]
