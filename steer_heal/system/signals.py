"""Stop requests from Ctrl-C or a scheduler: deferred to the next safe point inside `defer`, immediate elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loguru import logger

ASKED = ("SIGINT", "SIGTERM", "SIGUSR2")  # Ctrl-C; schedulers and `kill`; submitit's signal before the time limit
TELL_S = 0.5  # waited for a line to be logged, longer only while this thread holds the log
Handler = Callable[[int, FrameType | None], Any]


_asked = False
_behind: dict[int, Any] = {}  # the handlers that `block` has put aside
before_leaving: list[Callable[[], object]] = []  # actions run on SIGTERM, such as requeueing a job


def install_handlers() -> None:
    """Install handlers: SIGINT raises KeyboardInterrupt and SIGTERM raises SystemExit, once.

    A second SIGINT kills, or raises at once if the first was deferred. A second SIGTERM is ignored, and so is one
    after SIGUSR2 if SIGUSR2 has a handler: schedulers send several, and they set the time allowed for a graceful exit.
    """
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGUSR2"):
        theirs = _behind.get(signal.SIGUSR2, signal.getsignal(signal.SIGUSR2))
        if callable(theirs) and not isinstance(theirs, _Last):
            signal.signal(signal.SIGUSR2, _Last(theirs))


def stop_requested() -> bool:
    """True if this process has been asked to stop. SIGUSR2 does not count: its own handler gives it a meaning."""
    return _asked


def _note() -> None:
    global _asked
    _asked = True


def _tell(level: str, line: str) -> None:
    """Log from a handler, in a thread: the signal may have come while this one was logging, and loguru cannot nest."""
    thread = threading.Thread(target=logger.log, args=(level, "{}", line))
    thread.start()
    thread.join(TELL_S)


class _Last:
    """A handler after which SIGTERM is ignored, as it adds no information."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.handler(number, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _note()
    signal.signal(number, signal.SIG_DFL)
    _tell("WARNING", "stopping; press Ctrl-C again to exit at once")
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    _note()
    signal.signal(number, signal.SIG_IGN)
    _tell("WARNING", "asked to stop")
    for action in before_leaving:
        action()
    sys.exit(128 + number)


@contextmanager
def block() -> Iterator[None]:
    """Hold signals back inside the context: one that interrupts an import may abort the process, leave half a module,
    or be lost in somebody's bare `except`.

    Masking does not suffice: another thread, such as that of a progress bar, may take the signal, and Python runs its
    handler in the main thread nevertheless.
    """
    numbers = {getattr(signal, name) for name in ASKED if hasattr(signal, name)}
    held: list[int] = []
    hold = lambda number, _frame: held.append(number)  # noqa: E731
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    outermost = threading.current_thread() is threading.main_thread() and not _behind
    if outermost:
        _behind.update({n: signal.signal(n, hold) for n in numbers if signal.getsignal(n) is not None})
    try:
        yield
    finally:
        if outermost:
            for number in [n for n in _behind if signal.getsignal(n) is hold]:  # not replaced inside
                signal.signal(number, _behind[number])
            _behind.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in dict.fromkeys(held):
            signal.raise_signal(number)


class Pending:
    """The signal received inside `defer`, if any."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.handlers: dict[int, Handler] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    def obey(self) -> None:
        """Run the original handler of the deferred signal, if there is one."""
        if self.number is not None:
            self.handlers[self.number](self.number, None)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal by deferring it; only a second SIGINT takes effect at once."""
        if self and number == signal.SIGINT:
            self.handlers[number](number, frame)
        if not self:
            _tell("INFO", f"{signal.Signals(number).name}: stopping after this step")
        if not self or number != signal.SIGTERM:  # SIGTERM does not replace SIGUSR2, which also requeues a job
            self.number = number
        if number != signal.SIGUSR2:
            _note()


@contextmanager
def defer() -> Iterator[Pending]:
    """Defer signals: the caller checks the yielded object between steps and leaves; then the signal takes effect.

    Signals without a Python handler keep their effect, and handlers can be replaced only in the main thread.
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
            if signal.getsignal(number) == pending.note:  # keep a replacement installed by a handler
                signal.signal(number, handler)
        pending.obey()
