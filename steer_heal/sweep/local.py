"""The `local` launcher: runs cells one after another in this process, so that models are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loguru import logger

from steer_heal.sweep import Sweep
from steer_heal.sweep.cell import UNUSABLE, run_cell
from steer_heal.sweep.launcher import Launcher, give_up, log_status
from steer_heal.sweep.status import Status, in_a_line, probe_status, read
from steer_heal.system.terminal import cells_bar, log_to


class Local(Launcher):
    """Run cells in this process; if it is killed, the sweep ends."""

    name: Literal["local"]

    def launch(self, sweep: Sweep, cells: Sequence[str]) -> None:
        with cells_bar(len(cells)) as shown:
            for i, cell in enumerate(cells):
                shown.at(f"cell {i + 1}/{len(cells)}")
                logger.info("cell {} of {}: {}", i + 1, len(cells), sweep.label(cell))
                try:
                    status = self._run(sweep, cell)
                except (KeyboardInterrupt, SystemExit):
                    log_to(None)
                    left = cells[i + (read(sweep.place(cell)).state != "waiting") :]
                    give_up(sweep, left)
                    raise
                log_to(None)
                if status.state != "finished":
                    log_status(sweep.label(cell), status)
                shown.finished()

    def _run(self, sweep: Sweep, cell: str) -> Status:
        """Run a cell and return its status; `failed` if its folder cannot be read or written."""
        try:
            run_cell(sweep.place(cell))
        except UNUSABLE as error:
            return Status(state="failed", message=in_a_line(error))
        return probe_status(sweep.place(cell))
