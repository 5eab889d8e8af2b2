"""The terminal: tables on standard output; progress bars and the log on standard error.

Bars are drawn only if standard error is a terminal; loguru writes above them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

stdout = Console(highlight=False)
if not stdout.is_terminal:
    stdout = Console(highlight=False, width=120)  # a file or a pipe has no width of its own
stderr = Console(stderr=True)
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


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with stage, round and time left. Yields a function that advances it by a number of units."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(f"{position()} {what}".strip(), total=total)
        yield lambda n: progress.advance(task, n)


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
