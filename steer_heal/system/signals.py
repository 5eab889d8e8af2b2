"""Being told to stop, by Ctrl-C or by a scheduler: where the work says so, at the next good moment, else at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loguru import logger

ASKED = ("SIGINT", "SIGTERM", "SIGUSR2")  # Ctrl-C; schedulers and `kill`; what submitit sends before the time is up
Handler = Callable[[int, FrameType | None], Any]


_asked = False
before_leaving: list[Callable[[], object]] = []  # what is done when SIGTERM comes, such as to have a job requeued


def heed() -> None:
    """From here on SIGINT raises KeyboardInterrupt and SIGTERM SystemExit, once.

    A second SIGINT kills, or raises at once where the first was put off. A second SIGTERM is ignored, and so is one
    after SIGUSR2, if something handles that: schedulers send several, and how long an orderly end may take is theirs
    to say.
    """
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGUSR2"):
        theirs = signal.getsignal(signal.SIGUSR2)
        if callable(theirs) and not isinstance(theirs, _Last):
            signal.signal(signal.SIGUSR2, _Last(theirs))


def asked() -> bool:
    """Whether this process has been told to stop. What SIGUSR2 means is for its own handler to say."""
    return _asked


def _note() -> None:
    global _asked
    _asked = True


class _Last:
    """A handler after which SIGTERM says nothing new."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.handler(number, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _note()
    signal.signal(number, signal.SIG_DFL)
    logger.warning("stopping; a second Ctrl-C ends this at once")
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    _note()
    signal.signal(number, signal.SIG_IGN)
    logger.warning("told to stop")
    for deed in before_leaving:
        deed()
    sys.exit(128 + number)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back until its end: an import that one breaks into may abort the process, or leave half a module."""
    numbers = {getattr(signal, name) for name in ASKED if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pending:
    """The signal that came in the meantime, if one did."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.handlers: dict[int, Handler] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    def obey(self) -> None:
        """Do now what the signal would have done when it came."""
        if self.number is not None:
            self.handlers[self.number](self.number, None)

    def note(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals: only a second SIGINT is not put off."""
        if self and number == signal.SIGINT:
            self.handlers[number](number, frame)
        if not self:
            logger.info("{}: stopping after this step", signal.Signals(number).name)
        if not self or number != signal.SIGTERM:  # SIGUSR2 means more: that there is a job to be requeued
            self.number = number
        if number != signal.SIGUSR2:
            _note()


@contextmanager
def put_off() -> Iterator[Pending]:
    """Within it whoever may be asked to stop looks for it between two steps and leaves; then the signal has its effect.

    Signals without a handler of Python's keep their effect, and only a process's main thread has handlers at all.
    """
    pending = Pending()
    numbers = [getattr(signal, name) for name in ASKED if hasattr(signal, name)]
    if threading.current_thread() is threading.main_thread():
        pending.handlers = {n: h for n in numbers if callable(h := signal.getsignal(n))}
    for number in pending.handlers:
        signal.signal(number, pending.note)
    try:
        yield pending
    finally:
        for number, handler in pending.handlers.items():
            if signal.getsignal(number) == pending.note:  # what a handler has put in its place stays
                signal.signal(number, handler)
        pending.obey()
