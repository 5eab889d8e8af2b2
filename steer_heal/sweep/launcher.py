"""How the cells of a sweep are run. One file each; `hydra/launcher=...` chooses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loguru import logger

from steer_heal.config import Config, ConfigError, build
from steer_heal.processes import dead, describe
from steer_heal.sweep import Sweep
from steer_heal.sweep.status import ENDED, Status, read, write


class Launcher(Config):
    """Fields and deeds that every way to run cells has."""

    name: str

    def recorded(self) -> dict[str, Any]:
        """What sweep.json keeps of it, to build it again."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"} | self.model_dump(mode="json")

    def prepare(self) -> None:
        """Raise ConfigError for what this machine lacks."""

    def run(self, sweep: Sweep, cells: Sequence[str]) -> None:
        """Run cells, whose folders hold all that they need. One that fails is that cell's affair: its status tells.

        Told to stop, it leaves the cells that it has not begun with a word about that, and returns.
        """
        raise NotImplementedError(type(self))

    def status(self, sweep: Sweep) -> dict[str, Status]:
        """How each cell fares."""
        found = sweep.status()
        if dead(sweep.record.owner):
            left = {"state": "interrupted", "message": f"not begun: {describe(sweep.record.owner)} is gone"}
            found = {c: s.model_copy(update=left) if s.state == "waiting" else s for c, s in found.items()}
        return found

    def cancel(self, sweep: Sweep) -> None:
        """Stop it in good order. Raises ConfigError where that cannot be done from here."""
        owner = sweep.record.owner
        if dead(owner):
            raise ConfigError(f"{sweep.folder}: {describe(owner)}, which ran it, is gone already")
        try:
            os.kill(owner["pid"], signal.SIGTERM)
        except (ProcessLookupError, PermissionError) as error:
            raise ConfigError(f"{sweep.folder}: {describe(owner)}, which runs it: {error.strerror}") from None

    def wait(self, sweep: Sweep, pause: Callable[[float], None] = time.sleep) -> dict[str, Status]:
        """How each cell ended, once all have. What changes meanwhile is told."""
        before: dict[str, Status] = {}
        seconds = 0.5
        while True:
            now = self.status(sweep)
            for cell, status in now.items():
                if status.state != (before[cell].state if cell in before else "waiting"):
                    tell(cell, status)
                    seconds = 0.5
            if all(status.state in ENDED for status in now.values()):
                return now
            before = now
            pause(seconds)
            seconds = min(1.5 * seconds, 10.0)


def tell(cell: str, status: Status) -> None:
    """A line about a cell."""
    level = "WARNING" if status.state in ("failed", "interrupted", "lost") else "INFO"
    details: list[Any] = [
        status.job and f"job {status.job}",
        status.state != "waiting" and status.where(),
        status.message,
    ]
    logger.log(level, "{} {}", cell, ": ".join([status.state, ", ".join(filter(None, details))]).removesuffix(": "))


def give_up(sweep: Sweep, cells: Sequence[str]) -> None:
    """Say of cells that they were not begun."""
    left = {"state": "interrupted", "message": "not begun: the sweep was stopped"}
    for cell in cells:
        write(sweep.place(cell), read(sweep.place(cell)).model_copy(update=left))


def launcher_of(sweep: Sweep, fields: Mapping[str, Any] | None = None) -> Launcher:
    """The one that a sweep was begun with, some of its fields set anew. Raises ConfigError."""
    found = build(sweep.record.launcher | dict(fields or {}), "hydra.launcher")
    assert isinstance(found, Launcher)
    return found
