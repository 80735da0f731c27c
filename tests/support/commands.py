"""Commands as a user types them: a script in a process of its own, or, where what counts is what it
does, the same function in this process, which has imported torch already."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from lora_grpo.cli import run
from lora_grpo.machine.terminal import SCRIPTS

ROOT = Path(__file__).parents[2]
# A run of seconds on the embedded model.
FEW = ("--preset", "tiny", "--max-steps", 2, "--num-generations", 4, "--save-steps", 1)
FEW += ("--per-device-train-batch-size", 8, "--num-eval-items", 4, "--num-validation-items", 4)
FEW += ("--max-completion-length", 24, "--run-name", "run")


def run_script(
    script: str, *arguments: object, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, in the folder `home`."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
        cwd=home,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_here(script: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    """Do what a script does in this process, in the folder `home`."""
    command = next(name for name, file in SCRIPTS.items() if file == script)
    typed = [str(ROOT / "scripts" / script), *map(str, arguments)]
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = typed
    try:
        with (
            contextlib.chdir(home),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = run(command)
    except SystemExit as end:  # of --help and a wrong flag
        status = end.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(typed, status, out.getvalue(), err.getvalue())
