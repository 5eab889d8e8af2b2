"""How the cells of a sweep are run. One file each; `hydra/launcher=...` chooses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loguru import logger

from steer_heal.config import Config, ConfigError, build
from steer_heal.config.errors import plain
from steer_heal.sweep import Sweep
from steer_heal.sweep.status import ENDED, Status, read, write
from steer_heal.system.process import alive, describe


class Launcher(Config):
    """Fields and deeds that every way to run cells has."""

    name: str

    def recorded(self) -> dict[str, Any]:
        """What sweep.json keeps of it, to build it again."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"} | self.model_dump(mode="json")

    def prepare(self) -> None:
        """Raise ConfigError for what this machine lacks."""

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        """Run cells, whose folders hold all that they need, or hand them to somebody who will.

        One that fails is that cell's affair: its status tells. Told to stop (KeyboardInterrupt, SystemExit), it stops
        what it has begun, says of the others that they were not begun, and lets the exception pass.
        """
        raise NotImplementedError(type(self))

    def follow(self, sweep: Sweep) -> None:
        """Wait for what was handed on, unless it is to be left alone."""

    def status(self, sweep: Sweep) -> dict[str, Status]:
        """How each cell fares."""
        found = sweep.status()
        if sweep.launched_by() is None:
            left = {"state": "interrupted", "message": "not begun: nobody runs this sweep any more"}
            found = {c: s.model_copy(update=left) if s.state == "waiting" else s for c, s in found.items()}
        return found

    def cancel(self, sweep: Sweep) -> None:
        """Stop it in good order. Raises ConfigError where that cannot be done from here."""
        owner = sweep.launched_by()
        if owner is None:
            raise ConfigError(f"{sweep.folder}: nobody runs this sweep any more")
        if not alive(owner):
            raise ConfigError(f"{sweep.folder}: {describe(owner)} runs it, and only there it can be cancelled")
        os.kill(int(owner["pid"]), signal.SIGTERM)

    def wait(self, sweep: Sweep, pause: Callable[[float], None] = time.sleep) -> dict[str, Status]:
        """How each cell ended, once all have. What changes meanwhile is told; what is lost must be so at two looks."""
        before: dict[str, Status] = {}
        seconds = 0.5
        while True:
            now = self.status(sweep)
            for cell, status in now.items():
                if status.state != (before[cell].state if cell in before else "waiting"):
                    tell(cell, status)
                    seconds = 0.5
            if all(s.state in ENDED and (s.state != "lost" or _stays(s, before.get(cell))) for cell, s in now.items()):
                return now
            before = now
            pause(seconds)
            seconds = min(1.5 * seconds, 10.0)


def _stays(now: Status, before: Status | None) -> bool:
    """Whether an earlier look found the same; what it says of it may have grown, as seconds of silence do."""
    return before is not None and (before.state, before.attempt) == (now.state, now.attempt)


def tell(cell: str, status: Status) -> None:
    """A line about a cell."""
    level = "WARNING" if status.state in ("failed", "interrupted", "lost") else "INFO"
    job, where = status.job and f"job {status.job}", status.where() if status.state != "waiting" else ""
    details = ", ".join(filter(None, [job, where, status.message]))
    logger.log(level, "{} {}", plain(cell), plain(f"{status.state}: {details}" if details else status.state))


def give_up(sweep: Sweep, cells: Sequence[str], why: str = "the sweep was stopped") -> None:
    """Say of cells that they were not begun."""
    for cell in cells:
        left = {"state": "interrupted", "message": f"not begun: {why}"}
        write(sweep.place(cell), read(sweep.place(cell)).model_copy(update=left))


def launcher_of(sweep: Sweep, fields: Mapping[str, Any] | None = None) -> Launcher:
    """The one that a sweep was begun with, some of its fields set anew. Raises ConfigError."""
    found = build(sweep.record.launcher | dict(fields or {}), "hydra.launcher")
    assert isinstance(found, Launcher)
    return found
