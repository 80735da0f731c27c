"""A full disk, and a folder that cannot be written."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import FEW, run_here

from lora_grpo.machine.files import append_jsonl, check_room

FILLS_THE_DISK = """
import pathlib
junk = pathlib.Path("disk/junk")
def fill(completions, **columns):
    if pathlib.Path("disk/run/checkpoint-1").exists() and not (junk.parent / "once").exists():
        (junk.parent / "once").touch()
        try:
            with junk.open("wb") as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    return [float(len(text) % 5) for text in completions]
"""


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount a small disk")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    mount("-t", "tmpfs", "-o", "size=48m", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=False)


def test_a_run_that_fills_the_disk_says_so_and_is_resumed(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "fill.py").write_text(FILLS_THE_DISK)
    reward = ("--reward", "fill.py:fill", "--adapters-dir", "disk")
    done = run_here("train_lora.py", *FEW, "--max-steps", 3, *reward, home=tmp_path)
    assert (disk / "junk").exists(), done.stderr
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "disk/run" in done.stderr and "No space left" in done.stderr
    assert "--resume disk/run" in done.stderr
    assert not list((disk / "run").glob(".staged-checkpoint*"))
    (disk / "junk").unlink()
    again = run_here("train_lora.py", "--resume", "disk/run", home=tmp_path)
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line) for line in (disk / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_seen_before_anything_loads(
    disk: Path, tmp_path: Path
) -> None:
    mount("-o", "remount,ro", disk)
    model = ("--model", "tiny", "--dataset", "arithmetic", "--num-items", 1)
    for script, arguments in (
        ("train_lora.py", (*FEW, "--adapters-dir", "disk")),
        ("evaluate.py", (*model, "--output", "disk/new/eval.json")),
    ):
        done = run_here(script, *arguments, home=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "disk: Read-only file system" in done.stderr
        assert "base" not in done.stdout.partition("writes")[2]


def test_a_disk_that_is_too_small_is_seen_before(disk: Path) -> None:
    assert check_room(disk / "not" / "yet", 2**20, "--output-dir") == 48 * 2**20
    with pytest.raises(OSError, match=r"--output-dir .*needs 1\.00 GB and 0\.05 GB are free"):
        check_room(disk / "not" / "yet", 10**9, "--output-dir")


def test_a_line_that_could_not_be_added_names_its_file(disk: Path) -> None:
    with pytest.raises(OSError) as found:
        append_jsonl(disk / "metrics.jsonl", [{"text": "x" * 2**26}])
    assert found.value.filename == str(disk / "metrics.jsonl")
