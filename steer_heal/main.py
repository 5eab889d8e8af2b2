"""The command: `python -m steer_heal.main [-m] [group=option ...] [path=value ...]`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from loguru import logger
from omegaconf import DictConfig, OmegaConf

from steer_heal.config import CONF, build
from steer_heal.options import adopt
from steer_heal.progress import log_to
from steer_heal.refusal import REFUSED, no_choice, one_line, refuse


def main() -> None:
    """Run the command line. What it cannot use is refused in one line, with exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them in its own form
    try:
        job()
    except REFUSED as error:
        refuse(one_line(error))
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of reg=null
            raise
        refuse(no_choice())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """One cell."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    log_to(folder)
    adopt(OmegaConf.to_container(hydra_cfg.runtime.config_sources, resolve=True))  # type: ignore[arg-type]
    exp = build(cfg)

    from steer_heal.compare import show, track
    from steer_heal.dose import NoDose
    from steer_heal.filter import TooFew
    from steer_heal.heal import HealError
    from steer_heal.loop import run
    from steer_heal.plot import spread
    from steer_heal.results import set_aside, write
    from steer_heal.store import Store

    set_aside(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end: scratch folders go, W&B is told
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    overrides = list(hydra_cfg.overrides.task)
    logger.info("{} in {}", " ".join(overrides) or "defaults", folder)
    exp.runtime.apply()
    group = Path(hydra_cfg.sweep.dir).name if sweeping else None
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    store, begun = Store(exp.runtime.store), time.monotonic()
    try:
        with (
            logger.catch(level="DEBUG", reraise=True, message="the run failed"),  # the traceback, in log.txt
            exp.tracker.open(folder, config=config, group=group, run_name=folder.name) as tracker,
        ):
            result = run(exp, store, tracker)
            tracker.summary(write(folder, exp, store, result, overrides=overrides, seconds=time.monotonic() - begun))
            track(folder, tracker)
            taus = [row.get("tau") for row in result.rounds]
            tracker.image("drift", spread(result.drifts, taus, folder / "drift.png"))
    except (TooFew, NoDose, HealError) as error:
        if sweeping:  # the other cells go on
            raise
        logger.error("{}", error)
        sys.exit(1)
    if not sweeping:
        show(folder)


if __name__ == "__main__":
    main()
