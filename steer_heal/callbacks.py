"""What happens around a multirun: every cell is checked before the first one starts, and all are compared at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

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
                build({key: composed[key] for key in composed if key != "hydra"})
            except ConfigError as error:
                sys.exit(f"steer_heal: {' '.join(cell)}: {error}")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from steer_heal.compare import show

        show(Path(config.hydra.sweep.dir), seconds=time.monotonic() - self.begun)
