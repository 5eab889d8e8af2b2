"""Hydra's basic sweeper, extended to check all cells before the first one starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from loguru import logger

MANY = 20  # cells whose number is told before they are checked; fewer are checked at once, and a refusal stays one line
SHOWN = 3  # groups of equivalent cells that are shown


@dataclass
class CheckedSweeperConf(BasicSweeperConf):
    """The fields of `hydra/sweeper=basic`."""

    _target_: str = "hydra_plugins.steer_heal_plugins.sweeper.CheckedSweeper"
    # Not null, so that +hydra.sweeper.params.lam=0.1,0.3 can add to it.
    params: dict[str, str] | None = field(default_factory=dict)


class CheckedSweeper(BasicSweeper):
    """Run the product of all swept values, in order."""

    def sweep(self, arguments: list[str]) -> Any:
        """Check all cells, then run them. Raises ConfigError, naming the cell, before any folder is created.

        The check is here because Hydra turns exceptions in callbacks into warnings.
        """
        from steer_heal.sweep.preflight import cells_of, check_sweep
        from steer_heal.system.signals import block
        from steer_heal.system.terminal import counted, stderr

        assert self.config is not None
        HydraConfig.instance().set_config(self.config)
        count = len(cells_of(self.config))
        told_first = count >= MANY or stderr.is_terminal
        if told_first:
            logger.info("{}, which are checked first", counted(count, "cell"))
        checked = check_sweep(self.config)
        with block():
            from steer_heal.sweep.stored import preview
        if not told_first:
            logger.info("{}", counted(count, "cell"))
        for same in checked.equivalent[:SHOWN]:
            logger.info("these cells are equivalent and are computed once: {}", "; ".join(same))
        if (distinct := len(checked.groups)) < count:
            logger.info("{} to compute", counted(distinct, "distinct cell"))
        if line := preview(checked.distinct):
            logger.info("{}", line)
        return super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Skip Hydra's check: every cell has been built already, and composing hundreds again would take minutes."""


ConfigStore.instance().store(group="hydra/sweeper", name="checked", node=CheckedSweeperConf, provider="steer_heal")
