"""`hydra/launcher=local|parallel|slurm`: every cell is composed and written into its folder, then they are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class CellLauncher(Launcher):
    """Hydra's side of steer_heal/sweep/; its fields are those of the option that a subclass names."""

    option = ""

    def __init__(self, **fields: Any) -> None:
        self.fields = {"_target_": self.option, **fields}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises ConfigError for fields that cannot be used, and for what this machine lacks."""
        from steer_heal.config import build

        self.config, self.how = config, build(self.fields, "hydra.launcher")
        self.how.prepare()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run them all. How each ended is in its status.json, and nothing of that is an error of the launcher's."""
        from steer_heal.stopping import heed
        from steer_heal.sweep import Sweep

        entries = list(self._written(job_overrides, initial_job_idx))
        heed()
        sweep = Sweep.create(Path(str(self.config.hydra.sweep.dir)), entries, self.how.recorded())
        sweep.wait_again(sweep.cells)
        self.how.run(sweep, sweep.cells)
        returned = []
        for entry in entries:
            ended = JobReturn()
            ended.status, ended.overrides = JobStatus.COMPLETED, list(entry.overrides)
            returned.append(ended)
        return returned

    def _written(self, job_overrides: Sequence[Sequence[str]], first: int) -> Iterator[Any]:
        """Freeze every cell into its folder. Raises ConfigError, before it makes any, where two would have the same."""
        from hydra.core.config_loader import ConfigLoader
        from hydra.core.global_hydra import GlobalHydra

        from steer_heal.check import whole_cells
        from steer_heal.config import ConfigError
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
