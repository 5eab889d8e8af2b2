"""What happens around runs: one is checked before it starts, a sweep's are compared at its end."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from loguru import logger
from omegaconf import DictConfig

from steer_heal.config.errors import REFUSED, one_line, refuse
from steer_heal.sweep import NAME as SWEEP
from steer_heal.sweep import Sweep
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.preflight import check_run
from steer_heal.sweep.status import NAME as STATUS
from steer_heal.sweep.status import looked_at
from steer_heal.system.terminal import log_to

OURS = "hydra_plugins.steer_heal_plugins."


class Cells(Callback):
    """Hydra turns an exception in a callback into a warning; SystemExit is what stops it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the run's folder is made. Sweeps are checked by their sweeper."""
        log_to(None)
        try:
            check_run(config)
        except REFUSED as error:
            refuse(one_line(error))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.begun = time.monotonic()
        log_to(None)
        if not str(config.hydra.sweeper._target_).startswith(OURS):
            logger.warning("another sweeper than hydra/sweeper=checked: each cell is checked only when it starts")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A cell that failed must not cost the others their table: Hydra would stop at it before `on_multirun_end`.

        Our own launchers see to that, and tell Slurm and whoever began a cell's process that it failed.
        """
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            logger.error("this cell failed, the others go on: {}: {}", type(error).__name__, error)
            if not str(config.hydra.launcher._target_).startswith(OURS):
                job_return.status = JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from steer_heal.sweep.report import BUSY, concluded

        folder = Path(config.hydra.sweep.dir)
        if (folder / SWEEP).is_file():
            sweep = Sweep.open(folder)
            how = launcher_of(sweep)
            how.follow(sweep)
            statuses = how.status(sweep)
        else:  # another launcher than ours
            paths = sorted(folder.rglob(STATUS))
            statuses = {str(path.parent.relative_to(folder)): looked_at(path.parent) for path in paths}
        if any(status.state in BUSY for status in statuses.values()):  # submitted, and left to run
            shown = shlex.quote(str(folder))
            logger.info("to follow it: python -m steer_heal.sweep status|wait|resubmit|cancel {}", shown)
        elif concluded(folder, statuses, seconds=time.monotonic() - self.begun):
            sys.exit(1)
