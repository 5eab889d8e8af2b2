"""One cell of a sweep, from its folder alone: `python -m steer_heal.sweep.cell FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra.conf import HydraConf
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from steer_heal.config.errors import REFUSED
from steer_heal.config.plugins import adopt
from steer_heal.sweep.status import kept
from steer_heal.system.signals import asked, blocked

PARTS = ("config", "hydra", "overrides")
UNUSABLE = (OSError, *REFUSED)
LAUNCHED = "--launched"  # by a process that holds the other end of standard input


def freeze(folder: Path, config: DictConfig) -> None:
    """Write a composed cell into the `.hydra` of its folder, which then holds all that it takes to run it."""
    alone = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    parts = (alone, OmegaConf.masked_copy(config, "hydra"), config.hydra.overrides.task)
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    for name, part in zip(PARTS, parts, strict=True):
        (folder / f".hydra/{name}.yaml").write_text(OmegaConf.to_yaml(part), encoding="utf-8")


def thawed(folder: Path) -> DictConfig:
    """The configuration that `freeze` wrote, Hydra's own node included."""
    alone, hydra = (OmegaConf.load(folder / f".hydra/{name}.yaml") for name in PARTS[:2])
    typed = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)})
    with open_dict(typed), open_dict(typed.hydra):  # Hydra adds to its own class
        whole = OmegaConf.merge(typed, hydra, alone)
    OmegaConf.set_struct(whole, True)
    adopt(OmegaConf.to_container(whole.hydra.runtime.config_sources, resolve=True))  # type: ignore[arg-type]
    return cast(DictConfig, whole)


def carry_out(folder: Path) -> JobReturn:
    """Run a cell in this process, as Hydra runs a job. Its failure is in what is returned, and in status.json.

    Raises one of UNUSABLE, having written that down if it can, where the folder does not hold a cell.
    """
    with blocked():
        from steer_heal.main import cell, load_all

        load_all()
    setup_globals()
    try:
        config = thawed(folder)
    except UNUSABLE:
        with kept(folder):
            raise
    with open_dict(config):  # Hydra would write the cell anew, and leave half of it on a full disk or when it is killed
        config.hydra.output_subdir = None
    context = HydraContext(config_loader=cast(Any, None), callbacks=Callbacks(config))
    here = os.getcwd()
    os.chdir(config.hydra.runtime.cwd)  # where the sweep was begun, and its relative paths begin
    try:
        return run_job(cell, config, "hydra.sweep.dir", "hydra.sweep.subdir", context, configure_logging=False)
    finally:
        os.chdir(here)


def _end_with(pipe: int) -> None:
    """Stop in good order once nobody holds the other end of a pipe any more: the launcher is gone.

    At once if it went while this was stopping already, as at a second Ctrl-C.
    """
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL if asked() else signal.SIGTERM)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if LAUNCHED in sys.argv:
        threading.Thread(target=_end_with, args=(0,), name="launcher", daemon=True).start()
    ended = carry_out(Path(sys.argv[1]))
    sys.exit(0 if ended.status == JobStatus.COMPLETED else 1)
