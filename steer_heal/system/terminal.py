"""Bars for people at a terminal, nothing elsewhere; loguru writes above them."""

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

console = Console(stderr=True)
_where: ContextVar[str] = ContextVar("where", default="")


@contextmanager
def within(where: str) -> Iterator[None]:
    """Say in every bar begun inside where in the run it is, such as the round."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with stage, round and time left. Yields a function that moves it on by a number of units."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{_where.get()} {what}".strip(), total=total)
        yield lambda n: progress.advance(task, n)


def log_to(folder: Path | None) -> None:
    """Send the log to the terminal in short form and, once there is a run's folder, in full to its `log.txt`.

    Sinks of an earlier job of this process are removed first.
    """
    _remove_sinks()
    logger.configure(extra={})
    short = "<dim>{time:HH:mm:ss}</dim> <level>{level.name[0]}</level> {message}"
    if console.is_terminal:
        logger.add(
            lambda line: console.print(Text.from_ansi(str(line)), end=""), format=short, level="INFO", colorize=True
        )
    else:
        logger.add(sys.stderr, format=short, level="INFO", colorize=False)
    if folder is not None:
        full = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level} {message}"
        logger.add(folder / "log.txt", level="DEBUG", diagnose=False, format=full)


def _remove_sinks() -> None:
    """Also one whose file is on a full disk: what it could not write is lost, and that must not end a sweep."""
    while True:
        try:
            return logger.remove()
        except OSError:  # of the last sink that was removed; others may be left
            continue
