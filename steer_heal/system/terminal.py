"""The terminal: tables on standard output; progress bars and the log on standard error.

Bars are drawn only if standard error is a terminal; loguru writes above them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from steer_heal.system.streams import discard_output


class _Console(Console):
    """A console that falls silent when nobody reads it any more: the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if not self.stderr:
            discard_output()


stdout = _Console(highlight=False)
if not stdout.is_terminal:
    stdout = _Console(highlight=False, width=120)  # a file or a pipe has no width of its own
stderr = _Console(stderr=True)
_where: ContextVar[str] = ContextVar("where", default="")


@contextmanager
def within(where: str) -> Iterator[None]:
    """Prefix every bar started inside the context with the position in the run, such as the round.

    Contexts nest: their positions are joined by commas.
    """
    token = _where.set(", ".join(filter(None, (_where.get(), where))))
    try:
        yield
    finally:
        _where.reset(token)


def position() -> str:
    """The position in the run, as `within` sets it, such as `round 0, healed`; empty outside of all contexts."""
    return _where.get()


class Cells:
    """The bar of a sweep: a line with the cell, its stage, and the time left as the finished cells suggest."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.begun = self.latest = time.monotonic()  # the start, and when a cell last finished
        self.cell, self.task = "", progress.add_task("", total=total, left=self.left)

    def at(self, cell: str, stage: str = "") -> None:
        """Name the cell, or the number of those that run, and the stage."""
        self.cell = cell
        self.progress.update(self.task, description=f"{cell}: {stage}" if stage else cell)

    def finished(self, count: int = 1) -> None:
        """Count cells that have ended."""
        self.done += count
        self.latest = time.monotonic()
        self.progress.update(self.task, completed=self.done)

    def left(self) -> float | None:
        """Seconds until all have finished at the pace of those that have; None while there is none."""
        if not self.done:
            return None
        pace = (self.latest - self.begun) / self.done
        return max(0.0, pace * (self.total - self.done) - (time.monotonic() - self.latest))


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = task.fields["left"]()
        shown = "-:--:--" if seconds is None else time.strftime("%H:%M:%S", time.gmtime(seconds))
        days = "" if seconds is None or seconds < 86400 else f"{int(seconds // 86400)} d "
        return Text(f"{days}{shown} left", style="progress.remaining")


_cells: ContextVar[Cells | None] = ContextVar("cells", default=None)


@contextmanager
def cells_bar(total: int) -> Iterator[Cells]:
    """Show one bar for all cells of a sweep; the stages of a cell that runs inside the context are told in it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), _TimeLeft())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        token = _cells.set(cells := Cells(progress, total))
        try:
            yield cells
        finally:
            _cells.reset(token)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with stage, round and time left; inside `cells_bar`, tell them in its line.

    Yields a function that advances the bar by a number of units.
    """
    if (cells := _cells.get()) is not None:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            cells.at(cells.cell, f"{position()} {what} {done}/{total}".strip())

        advance(0)
        yield advance
        cells.at(cells.cell)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(f"{position()} {what}".strip(), total=total)
        yield lambda n: progress.advance(task, n)


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as 1 cell or 2 cells."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def log_to(folder: Path | None) -> None:
    """Send the log in short form to the terminal and, if a run's folder is given, in full to its `log.txt`.

    Sinks of an earlier job of this process are removed first.
    """
    _remove_sinks()
    logger.configure(extra={})
    short = "<dim>{time:HH:mm:ss}</dim> <level>{level.name[0]}</level> {message}"
    if stderr.is_terminal:
        logger.add(
            lambda line: stderr.print(Text.from_ansi(str(line)), end=""), format=short, level="INFO", colorize=True
        )
    else:
        logger.add(sys.stderr, format=short, level="INFO", colorize=False)
    if folder is not None:
        full = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level} {message}"
        logger.add(folder / "log.txt", level="DEBUG", diagnose=False, format=full)


def _remove_sinks() -> None:
    """Remove all sinks, even one whose file is on a full disk: its unwritten lines are lost, the sweep continues."""
    while True:
        try:
            return logger.remove()
        except OSError:  # raised by the sink just removed; others may be left
            continue


def escaped(text: str) -> str:
    """Make a model's output safe to show and keep what it is: control characters, escape sequences and marks that turn
    the direction of text are written as `\\x1b`, `\\u202e`; line breaks stay, and a tab becomes blanks.
    """
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text.expandtabs(4))
    return "".join(shown)


def printable(text: str) -> Text:
    """Make a model's output safe to print: markup is not interpreted, control characters are replaced."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


@functools.cache
def warn_once(line: str) -> None:
    """Log a warning, the same one once a process."""
    logger.warning("{}", line)
