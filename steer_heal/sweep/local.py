"""Cells one after another in this process: models are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loguru import logger

from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import UNUSABLE, carry_out
from steer_heal.sweep.launcher import Launcher, give_up, tell
from steer_heal.sweep.status import Status, in_a_line, looked_at, read
from steer_heal.system.terminal import log_to


class Local(Launcher):
    """What is killed ends the sweep."""

    name: Literal["local"]

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        for i, cell in enumerate(cells):
            logger.info("cell {} of {}: {}", i + 1, len(cells), cell)
            try:
                carry_out(sweep.place(cell))
            except (KeyboardInterrupt, SystemExit):
                log_to(None)
                left = cells[i + (read(sweep.place(cell)).state != "waiting") :]
                give_up(sweep, left)
                raise
            except UNUSABLE as error:  # its folder cannot be read, or written
                log_to(None)
                tell(cell, Status(state="failed", message=in_a_line(error)))
                continue
            log_to(None)
            if (status := looked_at(sweep.place(cell))).state != "finished":
                tell(cell, status)
