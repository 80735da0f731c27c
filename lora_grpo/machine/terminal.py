"""How every script ends, and commands as a user types them.

Errors become a sentence and an exit status here, and nowhere else. Any Python 3 reads this file: it
also speaks where the packages are missing. It imports little, since Ctrl-C is caught only after it.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 128 + 2, 128 + 13
# Each command of the installed package, and the script of a checkout that does the same.
COMMAND = "lora-grpo"
SCRIPTS = {
    "train": "train_lora.py",
    "evaluate": "evaluate.py",
    "report": "report.py",
    "diagnose": "diagnose.py",
    "merge": "merge_adapter.py",
    "export": "export_model.py",
    "push": "push_to_hub.py",
    "chat": "chat.py",
    "serve": "serve.py",
    "doctor": "doctor.py",
    "plan": "plan_memory.py",
    "check-rewards": "check_rewards.py",
}
WIDTH_IN_A_FILE = 120
NEEDED = ((3, 11), (3, 13))  # pyproject.toml: requires-python, the upper one excluded
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class FailedError(RuntimeError):
    """What was asked for was tried and failed; a script that ends with it has status 1."""


def run_command(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a script's `main` and return the exit status; `interrupted` is what Ctrl-C prints.

    0 done, 1 it failed, 2 bad input, 130 interrupted. `main` holds the script's imports, so that
    one that is missing or interrupted ends here too. Any other exception is a bug and keeps its
    traceback.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter would flush it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return end_interrupted(interrupted)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "lora_grpo") or find_spec(package) is not None:
            raise
        return complain(describe_environment(package), BAD_INPUT)
    except Exception as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause in chain(error)):
            return end_interrupted(interrupted)
        if isinstance(error, (FailedError, ArithmeticError)):
            return complain(str(error), FAILED)
        if (written := find_write_error(error)) is not None:
            return complain(describe_write_error(written), FAILED)
        if isinstance(error, OSError) and error.errno is not None:
            return complain(f"{error.filename or error}: {error.strerror}", BAD_INPUT)
        if isinstance(error, (OSError, ValueError)):
            return complain(str(error), BAD_INPUT)
        raise


def make_console(console: Console | None = None) -> Console:
    """Return this console, or one for the standard output, of one width where it is no terminal."""
    from rich.console import Console

    console = console or Console(highlight=False)
    if not (console.is_terminal and console.file.isatty()):
        console.width = WIDTH_IN_A_FILE
    return console


def can_redraw(console: Console) -> bool:
    """Return whether what a console shows may be drawn again: on a terminal that can, and where
    NO_COLOR does not ask for plain text; FORCE_COLOR makes no terminal of a log file."""
    is_utf = console.encoding.startswith("utf")
    return console.is_interactive and console.file.isatty() and is_utf and not console.no_color


def printable(text: str) -> str:
    """Return a model's text with pictures of the control characters that a terminal would obey."""
    return text.translate(PICTURES)


def complain(sentence: str, status: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status


def end_interrupted(sentence: str) -> int:
    # A second Ctrl-C, while threads and files are being closed, ends the process without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    below_the_echo = "\n" if sys.stderr.isatty() else ""  # a terminal shows ^C where it stands
    print(f"{below_the_echo}{sentence}", file=sys.stderr)
    return INTERRUPTED


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_write_error(error: BaseException) -> OSError | None:
    """Return the full disk or the forbidden folder behind an exception, or None.

    safetensors, which is written in Rust, gives the number of the system's error in its text alone;
    torch's writer, in C++, gives none, and hardly fails for another reason than a full disk.
    """
    for cause in chain(error):
        number = getattr(cause, "errno", None) if isinstance(cause, OSError) else None
        if type(cause).__name__ == "SafetensorError":
            digits = str(cause).rpartition("(os error ")[2].rstrip(")")
            number = int(digits) if digits.isdigit() else None
        if "inline_container" in str(cause) and "Reader" not in str(cause):
            number = errno.ENOSPC
        if number in (*FULL, *FORBIDDEN):
            return OSError(number, os.strerror(number), getattr(cause, "filename", None))
    return None


def describe_write_error(error: OSError) -> str:
    """Return what could not be written or read, why, and what to do."""
    place = error.filename or "the output"
    if error.errno in FULL:
        return (
            f"{place} could not be written: {error.strerror}. Free some space, or choose a folder "
            "on another disk"
        )
    return (
        f"{place}: {error.strerror}. Change who may write or read there, or choose another folder"
    )


def describe_environment(package: str) -> str:
    """Return what to type where this Python lacks a package."""
    lack = f"{sys.executable} has no package {package}"
    if not NEEDED[0] <= sys.version_info[:2] < NEEDED[1]:
        lack += f" and is Python {sys.version_info[0]}.{sys.version_info[1]}, not 3.11 or 3.12"
    if is_started_as_command() or not has_scripts():
        check = join(python_here(), "-m", "pip", "check")
        return (
            f"{lack}: install {COMMAND} again with its dependencies; {check} lists what is missing"
        )
    python = ROOT / ".venv/bin/python"
    if python.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        script = near(Path(sys.argv[0]).absolute())
        return f"{lack}: type {join(near(python), script, *sys.argv[1:])}"
    requirements = "requirements.txt" if which("nvidia-smi") else "requirements-cpu.txt"
    install = join(python_here(), "-m", "pip", "install", "-r", near(ROOT / requirements))
    return f"{lack}: run `make train` in {ROOT}, which sets up its .venv, or type {install}"


def is_started_as_command() -> bool:
    """Return whether this process was started as `lora-grpo COMMAND`, and not by a script."""
    return sys.argv[0].startswith(f"{COMMAND} ")


def has_scripts() -> bool:
    """Return whether the package lies in a checkout, with its scripts."""
    return (ROOT / "scripts" / SCRIPTS["train"]).is_file()


def command_line(script: str, *arguments: object) -> str:
    """Return the command that does what a script of scripts/ does, as it works where the user is:
    the script itself, or `lora-grpo` where that was started or where there is no checkout."""
    if has_scripts() and not is_started_as_command():
        return join(python_here(), near(ROOT / "scripts" / script), *arguments)
    name = next(name for name, file in SCRIPTS.items() if file == script)
    typed = which(COMMAND)
    found = typed is not None and Path(typed).parent == Path(sys.executable).parent
    start = (COMMAND,) if found else (python_here(), "-m", "lora_grpo.cli")
    return join(*start, name, *arguments)


def join(*words: object) -> str:
    """Return words as one shell command."""
    return " ".join(shlex.quote(str(word)) for word in words)


def near(path: Path) -> str:
    """Return a path below the working folder relative to it, any other as it is."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def python_here() -> str:
    """Return what to type for this Python: `python` where that is the one, else its path."""
    typed, this = Path(which("python") or ""), Path(sys.executable)
    is_this = typed.parent == this.parent and typed.resolve() == this.resolve()
    return "python" if is_this else near(this)
