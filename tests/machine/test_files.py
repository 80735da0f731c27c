"""Files and folders appear whole or not at all; an error of writing names what the user knows."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lora_grpo.machine.files import (
    append_jsonl,
    read_jsonl,
    staged_directory,
    write_json,
    write_jsonl,
    write_text,
)
from lora_grpo.machine.terminal import find_write_error

AWKWARD = {"text": 'caf\u00e9 \U0001f600 \u2028 \u2029 \x85 \x0b \x0c \x1c \r\n "quoted"', "n": 0.1}
FULL = OSError(errno.ENOSPC, "No space left on device")
IN_RUST = SafetensorError("I/O error: No space left on device (os error 28)")
IN_C = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_is_written_with_its_folders_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "first, and longer")
    write_text(path, "second \u00e9")
    assert path.read_bytes() == "second \u00e9".encode()
    assert names(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644
    write_json(path, AWKWARD)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == AWKWARD
    assert "\u00e9" in text and text.startswith('{\n  "text"') and text.endswith("}\n")


@pytest.mark.parametrize("stage", ["tempfile.mkstemp", "os.fsync", "os.chmod", "os.replace"])
def test_a_file_that_could_not_be_written_is_named_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "eval.json"
    write_json(path, {"step": 1})
    error: BaseException = OSError(errno.EROFS, "Read-only", str(tmp_path / ".staged-x"))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"lora_grpo.machine.files.{stage}", fail)
    with pytest.raises(OSError) as found:
        write_json(path, {"step": 2})
    assert find_write_error(found.value).filename == str(path)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1} and names(tmp_path) == ["eval.json"]


def test_rows_come_back_as_they_went_whatever_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    rows = [{"step": 1, **AWKWARD}, {"step": 2}]
    write_jsonl(path, rows)
    append_jsonl(path, [{"step": 3, **AWKWARD}])
    assert read_jsonl(path) == [*rows, {"step": 3, **AWKWARD}]
    assert path.read_bytes().count(b"\n") == 3
    with pytest.raises(TypeError):
        write_jsonl(path, [{"step": 2}, {"step": object()}])
    assert len(read_jsonl(path)) == 3


def test_a_last_line_cut_at_any_byte_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"step": 1, "text": "\u00e9\U0001f600"}, {"step": 2, "text": "\u00e9\U0001f600"}]
    write_jsonl(path, rows)
    whole = path.read_bytes()
    first_ends = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_jsonl(path) == (rows[:1] if length >= first_ends else [])
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2"):
        read_jsonl(path)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "mine"
    with staged_directory(target) as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "a.txt").write_text("x")
        assert not target.exists() and staged.parent == target.parent
    assert (target / "inner" / "a.txt").read_text() == "x"
    assert names(target.parent) == ["mine"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), FULL, IN_RUST, IN_C])
def test_a_folder_vanishes_when_its_making_fails(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "mine"
    with pytest.raises(BaseException) as found, staged_directory(target) as staged:
        (staged / "half.txt").write_text("x")
        raise error
    assert names(tmp_path) == []
    if error in (FULL, IN_RUST, IN_C):
        assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(target))
    else:
        assert found.value is error


def test_a_folder_that_is_there_is_never_touched(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "a.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="never overwritten"), staged_directory(target):
        pytest.fail("the block must not run")
    assert (target / "a.txt").read_text() == "precious" and names(tmp_path) == ["mine"]


def test_of_two_at_once_one_gets_the_name(tmp_path: Path) -> None:
    target = tmp_path / "run"
    taken = pytest.raises(FileExistsError, match="run was written by another process")
    with taken, staged_directory(target) as slower:
        (slower / "owner").write_text("slower")
        with staged_directory(target) as faster:
            (faster / "owner").write_text("faster")
    assert (target / "owner").read_text() == "faster" and names(tmp_path) == ["run"]
