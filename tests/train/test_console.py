"""On a real pseudo-terminal a run is shown live and leaves the screen as it found it; elsewhere it
prints the same plain lines."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from lora_grpo.grpo.batch import Batch
from lora_grpo.train.console import WORDS, Display
from lora_grpo.train.live import LEVELS, shorten, sparkline

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
STEPS = 7
RUN = f"""
import logging, sys, time, warnings
handler = logging.StreamHandler()
logging.getLogger("library").addHandler(handler)
from lora_grpo.grpo.batch import Batch
from lora_grpo.train.console import Display

display, kind = Display(), sys.argv[1]
completion = "<answer>\\n\\x1b[2J7\\x07\\n</answer>"
batch = Batch(["How many?"], ["7"], [completion], [9], [False], {{"correctness": [1.0]}})
with display.training({STEPS}):
    for step in range(1, {STEPS} + 1):
        if step == 3:
            warnings.warn("warned by a library")
            logging.getLogger("library").error("logged by a library")
            print("printed by a library")
            with display.bar("validating", 4) as advance:
                advance(4)
                time.sleep(0.6)  # a redraw or two
        if step == 5 and kind == "fails":
            raise RuntimeError("broken")
        if step == 5 and kind == "waits":
            print("waiting", flush=True)
            time.sleep(60)
        row = {{"step": step, "reward": 0.1 * step, "correct": None, "seconds": 2.0}}
        display.step(row, batch, {STEPS}, 5)
        time.sleep(0.05)
display.say("the end")
"""


def start(kind: str, output: int | None = None, **environment: str) -> subprocess.Popen[bytes]:
    plain = {name: text for name, text in os.environ.items() if name not in ("NO_COLOR", "CI")}
    end = subprocess.PIPE if output is None else output
    return subprocess.Popen(
        [sys.executable, "-c", RUN, kind],
        env={**plain, "TERM": "xterm-256color", **environment},
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=subprocess.STDOUT if output is None else output,
        preexec_fn=os.setsid,
    )


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))


def read_on(terminal: int, until: bytes = b"\0") -> bytes:
    """Return what comes out of a terminal until a word, or its end."""
    found = b""
    while until not in found:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not part:
            break
        found += part
    return found


def on_terminal(kind: str, **environment: str) -> tuple[str, int]:
    """Return all that a run writes to a terminal of 130 columns, and its exit status."""
    terminal, inside = pty.openpty()
    resize(terminal, 130)
    process = start(kind, inside, **environment)
    os.close(inside)
    written = b""
    if kind == "waits":
        written = read_on(terminal, b"waiting")
        resize(terminal, 40)
        process.send_signal(signal.SIGWINCH)
        time.sleep(0.6)  # two redraws
        process.send_signal(signal.SIGINT)
    written += read_on(terminal)
    os.close(terminal)
    return written.decode().replace("\r\n", "\n"), process.wait(30)


def in_pipe(**environment: str) -> str:
    return start("ends", **environment).communicate(timeout=60)[0].decode()


def lines_of(text: str) -> list[str]:
    """The lines without times, and without the ends of a frame, which is as wide as the window."""
    untimed = re.sub(r"\d+:\d\d left", "left", text)
    return [re.sub(r"(─+.| +│)$", "", line) for line in untimed.splitlines()]


@pytest.mark.parametrize(("kind", "status"), [("ends", 0), ("fails", 1), ("waits", -signal.SIGINT)])
def test_a_live_view_leaves_the_terminal_clean(kind: str, status: int) -> None:
    """At its end, by an exception, and by Ctrl-C after the window was made narrower."""
    written, found = on_terminal(kind)
    assert found == status or (kind == "waits" and found == 1)
    assert written.count(HIDE) == written.count(SHOW) == 1
    live, after = written[written.index(HIDE) :].split(SHOW)
    assert any(level in live for level in LEVELS) and "validating" in live
    shown = re.sub(r"\x1b\[[0-9;]*m", "", live)
    assert "␛[2J7␇" in shown and "gold 7  |  correctness 1.00" in shown
    for said in ("warned by", "logged by", "printed by"):
        # On a line of its own: the block is erased first.
        assert re.search(rf"\x1b\[2K[^\n]*{said} a library\n", live), said
    assert {f"step {step}/7" in shown for step in (1, 2, 3, 4)} == {True}
    last = {"ends": "the end", "fails": "RuntimeError: broken", "waits": "KeyboardInterrupt"}
    assert "\x1b" not in after.replace("\x1b[1A\x1b[2K", "") and last[kind] in after


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_plain_terminal_gets_the_lines_of_a_log_file(environment: dict[str, str]) -> None:
    plain = in_pipe()
    assert "\x1b" not in plain and "step 7/7" in plain and "a completion" in plain
    assert "validating" not in plain and "␛[2J7␇" in plain
    assert lines_of(on_terminal("ends", **environment)[0]) == lines_of(plain)


def test_a_log_file_stays_one_where_colours_are_forced() -> None:
    assert lines_of(in_pipe(FORCE_COLOR="1")) == lines_of(in_pipe())


def test_a_column_is_printed_from_its_first_value_on(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(console=Console(width=200, highlight=False))
    for step, correct in ((1, None), (2, 0.5), (3, None)):
        row = {"step": step, "reward": 0.1, "correct": correct, "seconds": 1.0}
        display.step(row, Batch(), total=3, every=5)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "correct" not in first and "clipped" not in first + second + third
    assert "correct  50.0 %" in second and "correct       -" in third


def test_the_words_are_explained_where_a_run_begins(capsys: pytest.CaptureFixture[str]) -> None:
    Display().begin()
    begun = capsys.readouterr().out.splitlines()
    Display().begin(explain=False)
    resumed = capsys.readouterr().out.splitlines()
    assert begun == [*resumed, *WORDS]
    for word in ("strict", "lenient", "clipped", "dead groups"):
        assert any(f"{word}:" in line for line in WORDS)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([2.0], "▁"),
        ([1, 1, 1], "▁▁▁"),
        ([0, 7], "▁█"),
        ([0, 0, 7, 7, 14, 14, 14], "▁▅██"),
    ],
)
def test_a_sparkline_spans_lowest_to_highest_within_its_width(
    values: list[float], drawn: str
) -> None:
    assert sparkline(values, 4) == drawn


def test_a_long_completion_keeps_both_ends() -> None:
    lines = [Console().render_str(str(at)) for at in range(9)]
    assert [line.plain for line in shorten(lines, 4)] == ["0", "1", "... 6 lines ...", "8"]
    assert shorten(lines, 9) == lines
