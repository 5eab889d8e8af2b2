"""The `local` launcher: runs cells one after another in this process, so that models are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loguru import logger

from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import UNUSABLE, run_cell
from steer_heal.sweep.launcher import Launcher, give_up, log_status
from steer_heal.sweep.status import Status, in_a_line, probe_status, read
from steer_heal.system.terminal import log_to


class Local(Launcher):
    """Run cells in this process; if it is killed, the sweep ends."""

    name: Literal["local"]

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        for i, cell in enumerate(cells):
            logger.info("cell {} of {}: {}", i + 1, len(cells), cell)
            try:
                run_cell(sweep.place(cell))
            except (KeyboardInterrupt, SystemExit):
                log_to(None)
                left = cells[i + (read(sweep.place(cell)).state != "waiting") :]
                give_up(sweep, left)
                raise
            except UNUSABLE as error:  # the cell's folder cannot be read or written
                log_to(None)
                log_status(cell, Status(state="failed", message=in_a_line(error)))
                continue
            log_to(None)
            if (status := probe_status(sweep.place(cell))).state != "finished":
                log_status(cell, status)
