"""`hydra/launcher=local|parallel|slurm`: compose every cell, write each to its folder, then run them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from steer_heal.config import ConfigError

if TYPE_CHECKING:
    from steer_heal.sweep import Sweep


class CellLauncher(Launcher):
    """The adapter from Hydra to steer_heal/sweep/. Its fields are those of the launcher named by `option`."""

    option = ""

    def __init__(self, **fields: Any) -> None:
        self.fields = {"_target_": self.option, **fields}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build the launcher. Raises ConfigError for invalid fields, and if this machine lacks a required program."""
        from steer_heal.config import build

        self.config, self.launcher = config, build(self.fields, "hydra.launcher")
        self.sweep: Sweep | None = None
        self.launcher.prepare()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run or submit all cells. A cell's failure is recorded in its status.json and is not an error here.

        A sweeper may call this several times: the sweep's folder then has the cells of all batches. Raises ConfigError
        if another sweep is running in the folder. When stopped by a signal, prints a summary and exits with 130.
        """
        from steer_heal.system.signals import block, install_handlers

        with block():
            from steer_heal.sweep import Entry, Sweep, launching
            from steer_heal.sweep.cell import load_all, save_cell
            from steer_heal.sweep.summary import print_summary

            load_all()
            install_handlers()
        folder = Path(str(self.config.hydra.sweep.dir))
        if self.sweep is None:
            _refuse_busy(folder)
        cells = self._composed(job_overrides, initial_job_idx)
        entries = [Entry(folder=name, overrides=tuple(given)) for name, (given, _) in cells.items()]
        try:
            with launching(folder):
                if self.sweep is None:
                    _refuse_busy(folder)  # another sweep may have started in the meantime
                try:
                    for name, (_, cell) in cells.items():
                        save_cell(folder / name, cell)
                    if self.sweep is None:
                        self.sweep = Sweep.create(folder, entries, self.launcher.recorded())
                    else:
                        self.sweep.add(entries)
                    self.sweep.wait_again(list(cells))
                except OSError as error:  # such as a full disk
                    raise ConfigError(f"{error.filename or folder}: {error.strerror}") from error
                self.launcher.launch(self.sweep, list(cells))
        except (KeyboardInterrupt, SystemExit):
            if self.sweep is None:
                raise
            print_summary(folder, self.launcher.status(self.sweep))
            sys.exit(130)
        returned = []
        for entry in entries:
            ended = JobReturn()
            ended.status, ended.overrides, ended.return_value = JobStatus.COMPLETED, list(entry.overrides), None
            returned.append(ended)
        return returned

    def _composed(
        self, job_overrides: Sequence[Sequence[str]], first: int
    ) -> dict[str, tuple[Sequence[str], DictConfig]]:
        """Overrides and configuration of each cell, by folder. Raises ConfigError if two cells have the same folder."""
        from hydra.core.config_loader import ConfigLoader
        from hydra.core.global_hydra import GlobalHydra

        from steer_heal.sweep.preflight import whole_cells
        from steer_heal.system.terminal import bar

        loader: ConfigLoader = GlobalHydra.instance().config_loader()
        cells = dict[str, tuple[Sequence[str], DictConfig]]()
        with bar("composing cells", len(job_overrides)) as advance:
            for given, cell in zip(job_overrides, whole_cells(self.config, loader, job_overrides, first), strict=True):
                name = str(cell.hydra.sweep.subdir)
                if name in cells:
                    both = "; ".join(" ".join(one) for one in (cells[name][0], given))
                    raise ConfigError(f"hydra.sweep.subdir={name!r} is the folder of two cells: {both}")
                cells[name] = given, cell
                advance(1)
        return cells


def _refuse_busy(folder: Path) -> None:
    """Raise ConfigError for a folder in which a sweep is running."""
    from steer_heal.sweep import NAME, Sweep
    from steer_heal.sweep.launcher import launcher_of
    from steer_heal.sweep.status import BUSY

    if not (folder / NAME).is_file():
        return
    earlier = Sweep.open(folder)
    busy = [cell for cell, status in launcher_of(earlier).status(earlier).items() if status.state in BUSY]
    if busy:
        raise ConfigError(f"hydra.sweep.dir={str(folder)!r}: a sweep is running there, for example its cell {busy[0]}")


class LocalLauncher(CellLauncher):
    """Run cells one after another."""

    option = "steer_heal.sweep.local.Local"


class ParallelLauncher(CellLauncher):
    """Run cells side by side."""

    option = "steer_heal.sweep.parallel.Parallel"


class SlurmLauncher(CellLauncher):
    """Submit cells to a cluster."""

    option = "steer_heal.sweep.slurm.Slurm"
