"""Standard output as it may be: of any encoding, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with the status that it returns.

    A closed pipe, as of `| head`, ends it quietly, with the status of a process that SIGPIPE has ended.
    """
    escape_unprintable()
    status: int | str | None
    try:
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        print(end="", flush=True)  # here, where a closed pipe is caught; the interpreter would complain of it at exit
    except BrokenPipeError:
        discard_output()
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)


def escape_unprintable() -> None:
    """Let standard output write a character that its encoding lacks as an escape, as standard error does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Send what is still written to standard output nowhere, so that nothing fails at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
