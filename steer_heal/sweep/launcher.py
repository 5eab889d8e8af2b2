"""The base class of launchers, which run a sweep's cells. `hydra/launcher=...` selects one; each has its own file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from loguru import logger

from steer_heal.config import Config, ConfigError, build
from steer_heal.config.errors import plain
from steer_heal.sweep import Sweep
from steer_heal.sweep.status import BUSY, ENDED, Status, read, write
from steer_heal.system.process import alive, describe
from steer_heal.system.terminal import cells_bar


class Launcher(Config):
    """The fields and methods that all launchers share."""

    name: str

    def recorded(self) -> dict[str, Any]:
        """The launcher as stored in sweep.json, from which it is built again."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"} | self.model_dump(mode="json")

    def prepare(self) -> None:
        """Raise ConfigError if this machine lacks a program that the launcher needs."""

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        """Run cells from their folders, or submit them.

        A cell's failure is recorded in its status and raises nothing. On KeyboardInterrupt or SystemExit, cells that
        are running are stopped, the others are marked as not started, and the exception propagates.
        """
        raise NotImplementedError(type(self))

    def follow(self, sweep: Sweep) -> None:
        """Wait for submitted cells, unless the launcher is set to return at once."""

    def status(self, sweep: Sweep) -> dict[str, Status]:
        """The status of each cell."""
        found = sweep.status()
        if sweep.launched_by() is None:
            left = {"state": "interrupted", "message": "not started: no process is running this sweep"}
            found = {c: s.model_copy(update=left) if s.state == "waiting" else s for c, s in found.items()}
        return found

    def cancel(self, sweep: Sweep) -> None:
        """Stop the sweep gracefully. Raises ConfigError if that cannot be done from this machine."""
        owner = sweep.launched_by()
        if owner is None:
            raise ConfigError(f"{sweep.folder}: no process is running this sweep")
        if not alive(owner):
            raise ConfigError(f"{sweep.folder}: {describe(owner)} runs it, and it can be cancelled only there")
        os.kill(int(owner["pid"]), signal.SIGTERM)

    def wait(self, sweep: Sweep, pause: Callable[[float], None] = time.sleep) -> dict[str, Status]:
        """Wait until all cells have ended, log changes, and return each status.

        A cell that is `lost` counts as ended once it is seen so twice in a row.
        """
        before: dict[str, Status] = {}
        seconds, now = 0.5, self.status(sweep)
        with cells_bar(sum(s.state not in ENDED for s in now.values())) as shown:
            while True:
                for cell, status in now.items():
                    if status.state != (before[cell].state if cell in before else "waiting"):
                        log_status(sweep.label(cell), status)
                        seconds = 0.5
                if all(
                    s.state in ENDED and (s.state != "lost" or _same(s, before.get(cell))) for cell, s in now.items()
                ):
                    return now
                running, left = (sum(s.state in some for s in now.values()) for some in (("running",), BUSY))
                if ended := shown.total - shown.done - left:
                    shown.finished(ended)
                shown.at(f"cells {len(now) - left}/{len(now)}", f"{running} running")
                before = now
                pause(seconds)
                seconds, now = min(1.5 * seconds, 10.0), self.status(sweep)


def _same(now: Status, before: Status | None) -> bool:
    """True if state and attempt are the same as before; the message may differ, as it counts seconds of silence."""
    return before is not None and (before.state, before.attempt) == (now.state, now.attempt)


def log_status(cell: str, status: Status) -> None:
    """Log a cell's status in one line; `cell` is its label."""
    level = "INFO" if status.state in ("finished", *BUSY) else "WARNING"
    job, where = status.job and f"job {status.job}", status.where() if status.state != "waiting" else ""
    details = ", ".join(filter(None, [job, where, status.message]))
    logger.log(level, "{} {}", plain(cell), plain(f"{status.state}: {details}" if details else status.state))


def give_up(sweep: Sweep, cells: Sequence[str], why: str = "the sweep was stopped") -> None:
    """Mark cells as interrupted before they started."""
    for cell in cells:
        left = {"state": "interrupted", "message": f"not started: {why}"}
        with suppress(FileNotFoundError):  # its folder was deleted
            write(sweep.place(cell), read(sweep.place(cell)).model_copy(update=left))


def launcher_of(sweep: Sweep, fields: Mapping[str, Any] | None = None) -> Launcher:
    """The launcher that a sweep was started with, with `fields` replaced. Raises ConfigError for invalid fields."""
    found = build(sweep.record.launcher | dict(fields or {}), "hydra.launcher")
    assert isinstance(found, Launcher)
    return found
