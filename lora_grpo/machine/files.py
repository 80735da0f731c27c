"""Files and folders that appear whole or not at all: written elsewhere, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_grpo.machine.terminal import find_write_error

STAGED = ".staged-"  # begins the name of whatever is not whole yet, or being removed


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, never a part."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{STAGED}{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add JSON objects, one per line, to the end of a file."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file that may have been cut in the middle of its last one.

    Raises:
        ValueError: another line is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].split(b"\n"), 1):
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error}): mend or remove that line"
            ) from error
        rows += [] if row is None else [row]
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: it holds none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or write it again") from error


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` on success and vanishes on any
    exception.

    Raises:
        FileExistsError: `target` is there already.
    """
    if target.exists():
        raise FileExistsError(
            f"{target} exists already and is never overwritten: choose another folder or move it"
        )
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield staged
            staged.chmod(0o755)
            take_name(staged, target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


def take_name(staged: Path, target: Path) -> None:
    """Rename a folder, unless another process took the name in the meantime."""
    try:
        staged.rename(target)
    except OSError:
        if not target.exists():
            raise
        raise FileExistsError(
            f"{target} was written by another process in the meantime and is never overwritten: "
            "choose another name"
        ) from None


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Let an error of writing name the file or folder that the user knows, not a temporary one."""
    try:
        yield
    except Exception as error:
        found = find_write_error(error)
        if found is None or (found.filename and not is_beside(Path(found.filename), place)):
            raise
        raise OSError(found.errno, found.strerror, str(place)) from error


def is_beside(path: Path, place: Path) -> bool:
    return path.absolute().is_relative_to(place.absolute().parent)


def check_room(target: Path, nbytes: int, flag: str) -> int:
    """Refuse, before anything is made, what could not be written; return the free bytes.

    Raises:
        OSError: the nearest folder that is there cannot be written, or lacks `nbytes` of space.
    """
    folder = next(path for path in (target, *target.absolute().parents) if path.exists())
    with naming(folder), tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            f"{flag} {target} needs {nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on its "
            "disk: make room or choose another disk"
        )
    return free
