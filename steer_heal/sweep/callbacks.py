"""Hydra callbacks: a single run is checked before it starts, and a sweep's results are compared at its end."""

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

from steer_heal.config import ConfigError
from steer_heal.config.errors import REFUSED, one_line, refuse
from steer_heal.sweep import NAME as SWEEP
from steer_heal.sweep import Sweep
from steer_heal.sweep.launcher import launcher_of
from steer_heal.sweep.preflight import check_run, expand_folder
from steer_heal.sweep.status import BUSY, probe_status
from steer_heal.sweep.status import NAME as STATUS
from steer_heal.system.terminal import log_to

OURS = "hydra_plugins.steer_heal_plugins."
IN_PROCESS = ("LocalLauncher", "BasicLauncher")  # launchers that do with a cell what a single run does


class Cells(Callback):
    """Callbacks for runs and sweeps. They stop Hydra with SystemExit, since it turns exceptions into warnings."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the run before its folder is created. Sweeps are checked by their sweeper."""
        log_to(None)
        try:
            _refuse_launcher(config)
            expand_folder(config, "run")
            check_run(config)
        except REFUSED as error:
            refuse(one_line(error))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Start the clock, and warn if a sweeper other than `checked` is selected."""
        self.begun = time.monotonic()
        log_to(None)
        try:
            expand_folder(config, "sweep")
        except REFUSED as error:
            refuse(one_line(error))
        if not str(config.hydra.sweeper._target_).startswith(OURS):
            logger.warning("the sweeper is not hydra/sweeper=checked, so each cell is checked only when it starts")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Log a failed cell, and mark it as completed so that Hydra reaches `on_multirun_end`, which prints the table.

        Our own launchers need no such mark, and the failure must stay visible to Slurm or the parent process.
        """
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            logger.error("this cell failed, the others continue: {}: {}", type(error).__name__, error)
            if not str(config.hydra.launcher._target_).startswith(OURS):
                job_return.status = JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Follow the sweep; print its results or the command to follow it. Exits with 1 if a cell has no result."""
        from steer_heal.sweep.summary import print_summary

        folder = Path(config.hydra.sweep.dir)
        if (folder / SWEEP).is_file():
            sweep = Sweep.open(folder)
            launcher = launcher_of(sweep)
            launcher.follow(sweep)
            statuses = launcher.status(sweep)
        else:  # not one of our launchers
            paths = sorted(folder.rglob(STATUS))
            statuses = {str(path.parent.relative_to(folder)): probe_status(path.parent) for path in paths}
        if any(status.state in BUSY for status in statuses.values()):  # submitted, and still queued or running
            shown = shlex.quote(str(folder))
            logger.info("to follow it: python -m steer_heal.sweep status|wait|resubmit|cancel {}", shown)
        elif print_summary(folder, statuses, seconds=time.monotonic() - self.begun):
            sys.exit(1)


def _refuse_launcher(config: DictConfig) -> None:
    """Raise ConfigError for a launcher that the command line of a single run names: only a sweep would use it.

    One that a file of the user's selects is for that user's sweeps.
    """
    if str(config.hydra.launcher._target_).endswith(IN_PROCESS):
        return
    for override in map(str, config.hydra.overrides.hydra):
        if override.startswith("hydra/launcher="):
            raise ConfigError(f"{override}: launchers run sweeps, and this is a single run; add -m, or leave it out")
