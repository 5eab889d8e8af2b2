"""The terminal: bars on a pseudo-terminal, streams of other encodings, pipes that nobody reads."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from steer_heal.system import terminal
from steer_heal.system.terminal import counted

CELLS = """
import time
from loguru import logger
from steer_heal.system.terminal import bar, cells_bar, log_to, within
log_to(None)
with cells_bar(3) as shown:
    for i in range(3):
        shown.at(f"cell {i + 1}/3")
        with within("round 0"), bar("heal", 4) as advance:
            for _ in range(4):
                time.sleep(0.05)
                advance(1)
        logger.info("line {}", i)
        shown.finished()
"""
SAID = """
from steer_heal.system.streams import exit_with
from steer_heal.system.terminal import stdout
def main():
    print('\\u2501 na\\u00efve \\N{SNOWMAN}')
    stdout.print('\\u2501 \\u4e2d')
exit_with(main)
"""
MANY = "from steer_heal.system.streams import exit_with\ndef main():\n    for i in range(100000): {}\nexit_with(main)\n"


def on_a_terminal(code: str, seconds: float = 60.0) -> str:
    """What a program writes to its standard error, which is a terminal."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.DEVNULL, env=environ)
    os.close(theirs)
    said, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert child.wait(seconds) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


def test_a_sweep_has_one_bar_with_cell_stage_and_time_left() -> None:
    said = on_a_terminal(CELLS)
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    bars, log = [line for line in lines if " left" in line], [line for line in lines if " I line " in line]
    assert len(log) == 3, said
    assert any(re.match(r"cell 1/3: round 0 heal \d/4 .*-:--:-- left", line) for line in bars), said
    assert any(re.match(r"cell 3/3: round 0 heal \d/4 .*\d\d:\d\d:\d\d left", line) for line in bars), said
    assert all(line.count("cell") <= 1 for line in bars), f"two bars side by side: {bars}"


def test_there_is_no_bar_where_there_is_no_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", CELLS], capture_output=True, text=True, check=True)
    assert [line.partition(" ")[2] for line in done.stderr.splitlines()] == ["I line 0", "I line 1", "I line 2"]


def test_the_time_left_is_that_of_the_finished_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.cells_bar(10) as shown:
        assert shown.left() is None
        now[0] += 60
        shown.finished(2)
        assert shown.left() == pytest.approx(30 * 8)
        now[0] += 30
        assert shown.left() == pytest.approx(30 * 7), "the running cell has used 30 s"
        now[0] += 1000
        assert shown.left() == 0


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, r"\u2501 na\xefve \u2603"),
        ({"PYTHONIOENCODING": "ascii"}, r"\u2501 na\xefve \u2603"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, r"\u2501 na\xefve \u2603"),
        ({"PYTHONIOENCODING": "utf-8"}, "━ naïve ☃"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(environ: dict[str, str], shown: str) -> None:
    done = subprocess.run([sys.executable, "-c", SAID], capture_output=True, env=os.environ | environ, check=False)
    assert done.returncode == 0, done.stderr
    encoding = environ.get("PYTHONIOENCODING", "ascii")
    first = done.stdout.decode(encoding).splitlines()[0]
    assert first.encode("ascii", "backslashreplace").decode() == shown.encode("ascii", "backslashreplace").decode()
    assert done.stderr == b""


@pytest.mark.parametrize("printing", ["print(i)", "t.stdout.print(i)"])
def test_a_closed_pipe_ends_quietly(printing: str) -> None:
    code = "import steer_heal.system.terminal as t\n" + MANY.format(printing)
    command = f"{sys.executable} -c '{code}' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    first, status = done.stdout.split()
    assert (first, done.stderr) == ("0", "")
    assert status in ("0", "141")


def test_help_into_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m steer_heal.main --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout.startswith("steer_heal: "), done.stderr) == (True, "")


def test_numbers_with_their_nouns() -> None:
    assert [counted(n, "cell") for n in (0, 1, 2)] == ["0 cells", "1 cell", "2 cells"]
