"""`hydra/launcher=local|parallel|slurm`: every cell is composed and written into its folder, then they are run."""

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
    """Hydra's side of steer_heal/sweep/; its fields are those of the option that a subclass names."""

    option = ""

    def __init__(self, **fields: Any) -> None:
        self.fields = {"_target_": self.option, **fields}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises ConfigError for fields that cannot be used, and for what this machine lacks."""
        from steer_heal.config import build

        self.config, self.how = config, build(self.fields, "hydra.launcher")
        self.sweep: Sweep | None = None
        self.how.prepare()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run them all, or submit them. How each ended is in its status.json, and nothing of that is an error here.

        A sweeper may call it several times: the sweep's folder then has the cells of all its batches. Raises
        ConfigError where another sweep goes on in the folder. Stopped by a signal it prints what there is, and exits
        with 130.
        """
        from steer_heal.system.signals import blocked, heed

        with blocked():
            from steer_heal.main import load_all
            from steer_heal.sweep import Entry, Sweep, launching
            from steer_heal.sweep.cell import freeze
            from steer_heal.sweep.report import concluded

            load_all()
            heed()
        folder = Path(str(self.config.hydra.sweep.dir))
        if self.sweep is None:
            _refuse_busy(folder)
        cells = self._composed(job_overrides, initial_job_idx)
        entries = [Entry(folder=name, overrides=tuple(given)) for name, (given, _) in cells.items()]
        try:
            with launching(folder):
                if self.sweep is None:
                    _refuse_busy(folder)  # another may have begun in the meantime
                for name, (_, cell) in cells.items():
                    freeze(folder / name, cell)
                if self.sweep is None:
                    self.sweep = Sweep.create(folder, entries, self.how.recorded())
                else:
                    self.sweep.change(cells=(*self.sweep.record.cells, *entries))
                self.sweep.wait_again(list(cells))
                self.how.launch(self.sweep, list(cells))
        except (KeyboardInterrupt, SystemExit):
            if self.sweep is None:
                raise
            concluded(folder, self.how.status(self.sweep))
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
        """Overrides and configuration of every cell by its folder. Raises ConfigError where two would have the same."""
        from hydra.core.config_loader import ConfigLoader
        from hydra.core.global_hydra import GlobalHydra

        from steer_heal.sweep.preflight import whole_cells

        loader: ConfigLoader = GlobalHydra.instance().config_loader()
        cells = dict[str, tuple[Sequence[str], DictConfig]]()
        for given, cell in zip(job_overrides, whole_cells(self.config, loader, job_overrides, first), strict=True):
            name = str(cell.hydra.sweep.subdir)
            if name in cells:
                both = "; ".join(" ".join(one) for one in (cells[name][0], given))
                raise ConfigError(f"hydra.sweep.subdir={name!r} is the folder of two cells: {both}")
            cells[name] = given, cell
        return cells


def _refuse_busy(folder: Path) -> None:
    """Raise ConfigError for a folder in which a sweep goes on."""
    from steer_heal.sweep import NAME, Sweep
    from steer_heal.sweep.launcher import launcher_of
    from steer_heal.sweep.report import BUSY

    if not (folder / NAME).is_file():
        return
    earlier = Sweep.open(folder)
    busy = [cell for cell, status in launcher_of(earlier).status(earlier).items() if status.state in BUSY]
    if busy:
        raise ConfigError(f"hydra.sweep.dir={str(folder)!r}: a sweep goes on there, such as its cell {busy[0]}")


class LocalLauncher(CellLauncher):
    """One after another."""

    option = "steer_heal.sweep.local.Local"


class ParallelLauncher(CellLauncher):
    """Side by side."""

    option = "steer_heal.sweep.parallel.Parallel"


class SlurmLauncher(CellLauncher):
    """On a cluster."""

    option = "steer_heal.sweep.slurm.Slurm"
