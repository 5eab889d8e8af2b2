"""What happens around a multirun: every cell is checked before the first starts, and all are compared at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from loguru import logger
from omegaconf import DictConfig, OmegaConf

from steer_heal.config import ConfigError, build


class Sweep(Callback):
    """Hydra turns an exception in a callback into a warning; SystemExit is what stops it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.begun = time.monotonic()
        loader = GlobalHydra.instance().config_loader()
        written = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*written, *config.hydra.overrides.task])
        for cell in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]:
            try:
                composed = loader.load_sweep_config(config, list(cell))
                build(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))
            except (ConfigError, HydraException) as error:
                reason = str(error).splitlines()[0]
                if isinstance(error, MissingConfigException):
                    reason += f"; there are {', '.join(error.options or [])}"
                sys.exit(f"steer_heal: {' '.join(cell)}: {reason}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A cell that failed must not cost the others their table: Hydra would stop at it before `on_multirun_end`."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            logger.error("this cell failed, the others go on: {}: {}", type(error).__name__, error)
            job_return.status = JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from steer_heal.compare import show

        folder = Path(config.hydra.sweep.dir)
        show(folder, seconds=time.monotonic() - self.begun)
        failed = [cell.parent.name for cell in folder.glob("*/log.txt") if not (cell.parent / "result.json").is_file()]
        if failed:
            sys.exit(f"steer_heal: no result from {', '.join(sorted(failed))}; the log.txt in each folder says why")
