"""A cell: one composed configuration, run in its own folder.

`python -m steer_heal.sweep.cell FOLDER` runs a cell of a sweep from its folder alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.callbacks import Callbacks
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, RunMode
from loguru import logger
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import OmegaConfDumper

from steer_heal import config as options
from steer_heal.config import build
from steer_heal.config.errors import REFUSED
from steer_heal.config.plugins import adopt
from steer_heal.sweep.archive import PARTS
from steer_heal.sweep.status import tracked_status
from steer_heal.system.signals import block, install_handlers, stop_requested
from steer_heal.system.streams import escape_unprintable
from steer_heal.system.terminal import log_to

UNUSABLE = (OSError, *REFUSED)
MOVED = options.MOVED | {"steer_heal.callbacks.Cells": "steer_heal.sweep.callbacks.Cells"}
LAUNCHED = "--launched"  # the parent process holds the other end of standard input


def load_all() -> None:
    """Import everything that a run needs, so that no signal interrupts an import later."""
    from steer_heal import loop  # noqa: F401
    from steer_heal.report import plots, run_folder, table  # noqa: F401


def run_config(cfg: DictConfig) -> None:
    """Run a composed configuration in its Hydra output folder, and record its status in status.json there.

    A single run that fails with RoundFailed logs the message and exits with status 1.
    """
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    with block():
        log_to(folder)
        load_all()
        install_handlers()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        with tracked_status(folder) as spent:
            _compute(cfg, folder, spent)
        return

    from steer_heal.artifacts import RoundFailed
    from steer_heal.report.table import show

    try:
        with tracked_status(folder) as spent:
            _compute(cfg, folder, spent)
    except RoundFailed as error:
        logger.error("{}", error)
        sys.exit(1)
    show(folder)


def _compute(cfg: DictConfig, folder: Path, spent: float) -> None:
    """Run the loop and write its results to the folder; earlier attempts took `spent` seconds."""
    hydra_cfg = HydraConfig.get()
    adopt(OmegaConf.to_container(hydra_cfg.runtime.config_sources, resolve=True))  # type: ignore[arg-type]
    exp = build(cfg)

    from steer_heal.loop import run
    from steer_heal.report.plots import drift_histograms
    from steer_heal.report.run_folder import rotate, write
    from steer_heal.report.table import track
    from steer_heal.store import Store
    from steer_heal.system.version import code_version

    rotate(folder)
    overrides = list(hydra_cfg.overrides.task)
    logger.info("{} in {}", " ".join(overrides) or "defaults", folder)
    exp.runtime.apply()
    group = Path(hydra_cfg.sweep.dir).name if hydra_cfg.mode == RunMode.MULTIRUN else None
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    config["code"] = code_version()
    store, begun = Store(exp.runtime.store), time.monotonic() - spent
    with (
        logger.catch(level="DEBUG", reraise=True, message="the run failed"),  # the traceback, in log.txt
        exp.tracker.open(folder, config=config, group=group, run_name=folder.name) as tracker,
    ):
        result = run(exp, store, tracker)
        tracker.summary(write(folder, exp, store, result, overrides=overrides, seconds=time.monotonic() - begun))
        track(folder, tracker)
        drifts, taus = [done.drift for done in result.rounds], [row.get("tau") for row in result.rows]
        tracker.image("drift", drift_histograms(drifts, taus, folder / "drift.png"))


def save_cell(folder: Path, config: DictConfig) -> None:
    """Write a composed cell to `.hydra` in its folder; the cell can be run from that folder alone."""
    whole = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(whole, dict)
    hydra = whole.pop("hydra")
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    for name, part in zip(PARTS, (whole, {"hydra": hydra}, hydra["overrides"]["task"]), strict=True):
        (folder / name).write_text(_yaml(part), encoding="utf-8")


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """libyaml where there is one, which is ten times as quick."""


_Dumper.add_representer(str, OmegaConfDumper.str_representer)  # quotes what would be read as a number


def _yaml(part: Any) -> str:
    """The text that OmegaConf.to_yaml gives."""
    return str(yaml.dump(part, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


def load_cell(folder: Path) -> DictConfig:
    """Read the configuration that `save_cell` wrote, Hydra's node included; modules that have moved are renamed."""
    texts = ((folder / name).read_text(encoding="utf-8") for name in PARTS[:2])
    alone, hydra = (OmegaConf.create(_renamed(text)) for text in texts)
    typed = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)})
    with open_dict(typed), open_dict(typed.hydra):  # Hydra adds fields to its own class
        whole = OmegaConf.merge(typed, hydra, alone)
    OmegaConf.set_struct(whole, True)
    adopt(OmegaConf.to_container(whole.hydra.runtime.config_sources, resolve=True))  # type: ignore[arg-type]
    return cast(DictConfig, whole)


def run_cell(folder: Path) -> JobReturn:
    """Run a cell in this process, as Hydra runs a job. A failure is recorded in the returned value and in status.json.

    Raises one of UNUSABLE if the folder does not hold a cell, after recording that in status.json if possible.
    """
    with block():
        load_all()
    setup_globals()
    try:
        config = load_cell(folder)
    except UNUSABLE:
        with tracked_status(folder):
            raise
    with open_dict(config):  # otherwise Hydra rewrites the cell, and a kill or a full disk leaves it incomplete
        config.hydra.output_subdir = None
    context = HydraContext(config_loader=cast(Any, None), callbacks=Callbacks(config))
    here = os.getcwd()
    os.chdir(config.hydra.runtime.cwd)  # relative paths in the configuration start from the sweep's working directory
    try:
        return run_job(run_config, config, "hydra.sweep.dir", "hydra.sweep.subdir", context, configure_logging=False)
    finally:
        os.chdir(here)


def _renamed(text: str) -> str:
    """Replace the names of classes that have moved in YAML text."""
    for old, new in MOVED.items():
        text = text.replace(f"_target_: {old}\n", f"_target_: {new}\n")
    return text


def _stop_at_eof(pipe: int) -> None:
    """Stop this process gracefully when the other end of a pipe is closed, which means that the launcher is gone.

    If this process is already stopping, for example after a second Ctrl-C, it is killed immediately.
    """
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL if stop_requested() else signal.SIGTERM)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    escape_unprintable()
    if LAUNCHED in sys.argv:
        threading.Thread(target=_stop_at_eof, args=(0,), name="launcher", daemon=True).start()
    ended = run_cell(Path(sys.argv[1]))
    sys.exit(0 if ended.status == JobStatus.COMPLETED else 1)
