"""How every script ends, and commands that work as they are printed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lora_grpo.machine.terminal import FailedError, command_line, run_command

ROOT = Path(__file__).parents[2]
IN_RUST = "Error while serializing: I/O error: No space left on device (os error 28)"


def raiser(error: BaseException):
    def main() -> None:
        raise error

    return main


def fill_disk_in_a_library() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "out/model.bin")
    except OSError as error:
        raise RuntimeError("could not save") from error


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (raiser(ValueError("--r must be 1")), 2, "error: --r must be 1"),
        (raiser(FileNotFoundError("adapters/x is not there")), 2, "error: adapters/x is not there"),
        (raiser(FileNotFoundError(errno.ENOENT, "No such file", "x.json")), 2, "x.json: No such"),
        (raiser(FailedError("the proof failed")), 1, "error: the proof failed"),
        (raiser(FloatingPointError("the loss became nan")), 1, "error: the loss became nan"),
        (raiser(PermissionError(errno.EACCES, "Permission denied", "a/b")), 1, "a/b: Permission"),
        (raiser(OSError(errno.EROFS, "Read-only file system", "a/b")), 1, "a/b: Read-only"),
        (raiser(SafetensorError(IN_RUST)), 1, "No space left on device"),
        (fill_disk_in_a_library, 1, "out/model.bin could not be written: No space left"),
        (raiser(KeyboardInterrupt()), 130, "stopped here"),
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
    ],
)
def test_each_end_is_one_line_and_a_status(main, status: int, said: str, capsys) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        assert run_command(main, interrupted="stopped here") == status
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr().err
    assert said in printed and len(printed.strip().splitlines()) <= 1


@pytest.mark.parametrize(
    "error",
    [
        KeyError("step"),
        RuntimeError("a bug"),
        ModuleNotFoundError("No module named 'lora_grpo.gone'", name="lora_grpo.gone"),
        ModuleNotFoundError("No module named 'json.gone'", name="json.gone"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(raiser(error))


def run(command: list[object], home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=home,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone of the scripts and the package, without an environment."""
    home = tmp_path / "my clone"
    for name in ("scripts", "lora_grpo"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements-cpu.txt", home)
    return home


@pytest.mark.parametrize("script", ["train_lora.py", "benchmark.py"])
def test_a_python_without_the_packages_says_what_to_type(checkout: Path, script: str) -> None:
    """`-S` hides the packages of the environment that the tests run in."""
    done = run([sys.executable, "-S", f"scripts/{script}"], checkout)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "-m pip install -r requirements-cpu.txt" in done.stderr


def test_an_environment_beside_the_scripts_is_what_to_type(checkout: Path) -> None:
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    done = run([sys.executable, "-S", "scripts/train_lora.py", "--model", "a b"], checkout)
    typed = done.stderr.strip().partition("type ")[2]
    assert typed == ".venv/bin/python scripts/train_lora.py --model 'a b'"
    from_elsewhere = run([sys.executable, "-S", checkout / "scripts/doctor.py"], checkout.parent)
    assert "type 'my clone/.venv/bin/python' 'my clone/scripts/doctor.py'" in from_elsewhere.stderr


def test_a_printed_command_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for home in (ROOT, tmp_path):
        monkeypatch.chdir(home)
        line = command_line("doctor.py", "--adapters-dir", "a b", "--help")
        assert "'a b'" in line
        done = run(["sh", "-c", line], home)
        assert done.returncode == 0 and "--probe-timeout" in done.stdout, line


def test_the_python_that_the_shell_finds_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(folder))
    assert command_line("chat.py", "adapters/tiny") == "python scripts/chat.py adapters/tiny"
    monkeypatch.setenv("PATH", "")
    assert command_line("chat.py").endswith("python scripts/chat.py")
    assert not command_line("chat.py").startswith("python ")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = ROOT / "scripts/check_rewards.py"
    line = f"'{sys.executable}' '{script}' | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = run(["bash", "-c", line], tmp_path)
    assert done.stderr == "" and done.returncode in (0, 1, 141)


@pytest.mark.parametrize(("script", "seconds"), [("train_lora.py", 1.0), ("doctor.py", 1.5)])
def test_ctrl_c_while_importing_is_one_line(tmp_path: Path, script: str, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert printed.strip() == "interrupted"
