"""`hydra/launcher=local|parallel|slurm`: every cell is composed and written into its folder, then they are run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
        from steer_heal.stopping import blocked, heed

        with blocked():
            from steer_heal.main import load_all
            from steer_heal.sweep import NAME, Sweep
            from steer_heal.sweep.launcher import launcher_of
            from steer_heal.sweep.report import BUSY, concluded

            load_all()
            heed()
        folder = Path(str(self.config.hydra.sweep.dir))
        if self.sweep is None and (folder / NAME).is_file():
            earlier = Sweep.open(folder)
            busy = [c for c, s in launcher_of(earlier).status(earlier).items() if s.state in BUSY]
            if busy:
                raise ConfigError(f"hydra.sweep.dir={str(folder)!r}: a sweep goes on there, such as its cell {busy[0]}")
        entries = list(self._written(job_overrides, initial_job_idx))
        if self.sweep is None:
            self.sweep = Sweep.create(folder, entries, self.how.recorded())
        else:
            self.sweep.change(cells=(*self.sweep.record.cells, *entries))
        names = [entry.folder for entry in entries]
        try:
            with self.sweep.launching():
                self.sweep.wait_again(names)
                self.how.launch(self.sweep, names)
        except (KeyboardInterrupt, SystemExit):
            concluded(folder, self.how.status(self.sweep))
            sys.exit(130)
        returned = []
        for entry in entries:
            ended = JobReturn()
            ended.status, ended.overrides, ended.return_value = JobStatus.COMPLETED, list(entry.overrides), None
            returned.append(ended)
        return returned

    def _written(self, job_overrides: Sequence[Sequence[str]], first: int) -> Iterator[Any]:
        """Freeze every cell into its folder. Raises ConfigError, before it makes any, where two would have the same."""
        from hydra.core.config_loader import ConfigLoader
        from hydra.core.global_hydra import GlobalHydra

        from steer_heal.check import whole_cells
        from steer_heal.sweep import Entry
        from steer_heal.sweep.cell import freeze

        loader: ConfigLoader = GlobalHydra.instance().config_loader()
        folder, cells = Path(str(self.config.hydra.sweep.dir)), dict[str, tuple[Sequence[str], DictConfig]]()
        for given, cell in zip(job_overrides, whole_cells(self.config, loader, job_overrides, first), strict=True):
            name = str(cell.hydra.sweep.subdir)
            if name in cells:
                both = "; ".join(" ".join(one) for one in (cells[name][0], given))
                raise ConfigError(f"hydra.sweep.subdir={name!r} is the folder of two cells: {both}")
            cells[name] = given, cell
        for name, (given, cell) in cells.items():
            freeze(folder / name, cell)
            yield Entry(folder=name, overrides=tuple(given))


class LocalLauncher(CellLauncher):
    """One after another."""

    option = "steer_heal.sweep.local.Local"


class ParallelLauncher(CellLauncher):
    """Side by side."""

    option = "steer_heal.sweep.parallel.Parallel"


class SlurmLauncher(CellLauncher):
    """On a cluster."""

    option = "steer_heal.sweep.slurm.Slurm"
