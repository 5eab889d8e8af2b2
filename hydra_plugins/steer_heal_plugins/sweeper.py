"""Hydra's own sweeper, which checks all cells before the first starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from loguru import logger


@dataclass
class CheckedSweeperConf(BasicSweeperConf):
    """The fields of `hydra/sweeper=basic`."""

    _target_: str = "hydra_plugins.steer_heal_plugins.sweeper.CheckedSweeper"
    # not null, so that +hydra.sweeper.params.lam=0.1,0.3 can add to it
    params: dict[str, str] | None = field(default_factory=dict)


class CheckedSweeper(BasicSweeper):
    """The product of all swept values, in order."""

    def sweep(self, arguments: list[str]) -> Any:
        """Raises ConfigError, naming the cell, before anything is made. (A callback's exceptions become warnings.)"""
        from steer_heal.sweep.preflight import check_sweep

        assert self.config is not None
        for same in check_sweep(self.config):
            logger.info("these cells mean the same and are computed once: {}", "; ".join(same))
        return super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: the check composed and built every cell, and composing hundreds a second time takes minutes."""


ConfigStore.instance().store(group="hydra/sweeper", name="checked", node=CheckedSweeperConf, provider="steer_heal")
