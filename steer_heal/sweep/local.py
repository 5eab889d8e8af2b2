"""Cells one after another in this process: models are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loguru import logger

from steer_heal.progress import log_to
from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import carry_out
from steer_heal.sweep.launcher import Launcher, give_up, tell
from steer_heal.sweep.status import looked_at


class Local(Launcher):
    """What is killed ends the sweep."""

    name: Literal["local"]

    def run(self, sweep: Sweep, cells: Sequence[str]) -> None:
        for i, cell in enumerate(cells):
            logger.info("cell {} of {}: {}", i + 1, len(cells), cell)
            try:
                carry_out(sweep.place(cell))
            except (KeyboardInterrupt, SystemExit):
                log_to(None)
                give_up(sweep, cells[i + 1 :])
                return
            log_to(None)
            if (status := looked_at(sweep.place(cell))).state != "finished":
                tell(cell, status)
