"""The command: `python -m steer_heal.main [-m] [group=option ...] [path=value ...]`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from loguru import logger
from omegaconf import DictConfig, OmegaConf

from steer_heal.config import CONF, build
from steer_heal.config.errors import REFUSED, no_choice, one_line, refuse
from steer_heal.config.plugins import adopt
from steer_heal.sweep.status import kept
from steer_heal.system.signals import blocked, heed
from steer_heal.system.terminal import log_to


def main() -> None:
    """Run the command line. What it cannot use is refused in one line, with exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them in its own form
    try:
        job()
    except REFUSED as error:
        refuse(one_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of reg=null
            raise
        refuse(no_choice())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """One run, or one cell under a launcher that is not ours."""
    cell(cfg)


def load_all() -> None:
    """Import what a run needs, so that no signal breaks into it later."""
    from steer_heal.report import run_folder as results  # noqa: F401


def cell(cfg: DictConfig) -> None:
    """One cell, in the folder that Hydra gave it. How it goes is in its status.json, as it goes."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    with blocked():
        log_to(folder)
        heed()
        load_all()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        with kept(folder):
            _computed(cfg, folder)
        return

    from steer_heal.compare import show
    from steer_heal.dose import NoDose
    from steer_heal.filter import TooFew
    from steer_heal.heal import HealError

    try:
        with kept(folder):
            _computed(cfg, folder)
    except (TooFew, NoDose, HealError) as error:
        logger.error("{}", error)
        sys.exit(1)
    show(folder)


def _computed(cfg: DictConfig, folder: Path) -> None:
    """Run the loop, and leave in the folder what it found."""
    hydra_cfg = HydraConfig.get()
    adopt(OmegaConf.to_container(hydra_cfg.runtime.config_sources, resolve=True))  # type: ignore[arg-type]
    exp = build(cfg)

    from steer_heal.compare import track
    from steer_heal.loop import run
    from steer_heal.report.plots import spread
    from steer_heal.report.run_folder import set_aside, write
    from steer_heal.store import Store

    set_aside(folder)
    overrides = list(hydra_cfg.overrides.task)
    logger.info("{} in {}", " ".join(overrides) or "defaults", folder)
    exp.runtime.apply()
    group = Path(hydra_cfg.sweep.dir).name if hydra_cfg.mode == RunMode.MULTIRUN else None
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    store, begun = Store(exp.runtime.store), time.monotonic()
    with (
        logger.catch(level="DEBUG", reraise=True, message="the run failed"),  # the traceback, in log.txt
        exp.tracker.open(folder, config=config, group=group, run_name=folder.name) as tracker,
    ):
        result = run(exp, store, tracker)
        tracker.summary(write(folder, exp, store, result, overrides=overrides, seconds=time.monotonic() - begun))
        track(folder, tracker)
        taus = [row.get("tau") for row in result.rounds]
        tracker.image("drift", spread(result.drifts, taus, folder / "drift.png"))


if __name__ == "__main__":
    main()
