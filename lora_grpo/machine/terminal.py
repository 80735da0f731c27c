"""How every script ends, and commands as a user types them.

Errors become a sentence and an exit status here, and nowhere else. Any Python 3 reads this file: it
also speaks where the packages are missing. It imports little, since Ctrl-C is caught only after it.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 128 + 2, 128 + 13
# Each command of the installed package, and the script of a checkout that does the same.
COMMAND = "lora-grpo"
SCRIPTS = {
    "train": "train_lora.py",
    "evaluate": "evaluate.py",
    "merge": "merge_adapter.py",
    "export": "export_model.py",
    "push": "push_to_hub.py",
    "chat": "chat.py",
    "serve": "serve.py",
    "doctor": "doctor.py",
    "plan": "plan_memory.py",
    "check-rewards": "check_rewards.py",
}
NEEDED = ((3, 11), (3, 13))  # pyproject.toml: requires-python, the upper one excluded
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        if not is_missing_package(error.name):
            raise
        return complain(describe_environment(str(error.name)), BAD_INPUT)
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


def is_missing_package(name: str | None) -> bool:
    """Return whether a module is missing because the environment is incomplete, and not because
    the code is wrong: then every package that this one requires is installed."""
    from importlib.util import find_spec

    package = (name or "").partition(".")[0]
    if package in ("", "lora_grpo") or find_spec(package) is not None:
        return False
    return bool(missing_requirements())


def missing_requirements() -> list[str]:
    """Return what the requirement file of the checkout pins, or the installed package requires,
    and this Python does not have."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
        required = [line.partition("#")[0].strip() for line in lines]
        required = [line for line in required if "==" in line]
    except OSError:
        try:
            required = [line for line in requires(COMMAND) or () if "extra ==" not in line]
        except PackageNotFoundError:
            return []
    return [line for line in required if not is_installed(re.match(r"[\w.-]+", line)[0])]


def is_installed(distribution: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def describe_environment(package: str) -> str:
    """Return what to type where this Python lacks a package."""
    from shutil import which

    lack = f"{sys.executable} has no package {package}"
    if is_started_as_command() or not has_scripts():
        missing = missing_requirements()
        return f"{lack}: type {join(python_here(), '-m', 'pip', 'install', *missing)}"
    script, arguments = near(Path(sys.argv[0]).absolute()), sys.argv[1:]
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        return f"{lack}: type {join(near(python), script, *arguments)}"
    least, beyond = NEEDED
    if not least <= sys.version_info[:2] < beyond:
        return (
            f"{lack}, and is Python {sys.version_info[0]}.{sys.version_info[1]}, where 3.11 or "
            f"3.12 is needed: run {join('make', '-C', near(ROOT), 'PYTHON=python3.12', 'train')}"
        )
    gpu = which("nvidia-smi") is not None
    requirements = near(ROOT / ("requirements.txt" if gpu else "requirements-cpu.txt"))
    install = ("-m", "pip", "install", "-r", requirements)
    if sys.prefix != sys.base_prefix:
        return f"{lack}: type {join(python_here(), *install)}"
    make = join(python_here(), "-m", "venv", near(python.parents[1]))
    return (
        f"{lack}: run `make train` in {ROOT}, or type {make} && {join(near(python), *install)}, "
        f"then {join(near(python), script, *arguments)}"
    )


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
    return join(*console_command(), name, *arguments)


def console_command() -> tuple[str, ...]:
    """Return what to type for `lora-grpo`: its name where the shell finds it, else its path."""
    from shutil import which

    own = Path(sys.executable).parent / COMMAND
    if not own.is_file():
        return (python_here(), "-m", "lora_grpo.cli")
    typed = which(COMMAND)
    return (COMMAND if typed and Path(typed) == own else near(own),)


def join(*words: object) -> str:
    """Return words as one shell command."""
    return " ".join(shlex.quote(str(word)) for word in words)


def near(path: Path) -> str:
    """Return a path below the working folder relative to it, any other as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def python_here() -> str:
    """Return what to type for this Python: `python` where that is the one, else its path."""
    from shutil import which

    typed = which("python")
    if typed and Path(typed).parent == Path(sys.executable).parent and is_same(typed):
        return "python"
    return near(Path(sys.executable))


def is_same(python: str) -> bool:
    try:
        return os.path.samefile(python, sys.executable)
    except OSError:
        return False
