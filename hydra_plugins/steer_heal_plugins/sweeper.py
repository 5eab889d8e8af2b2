"""Hydra's own sweeper, whose cells steer_heal/callbacks.py has checked before it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore


@dataclass
class CheckedSweeperConf(BasicSweeperConf):
    """The fields of `hydra/sweeper=basic`."""

    _target_: str = "hydra_plugins.steer_heal_plugins.sweeper.CheckedSweeper"


class CheckedSweeper(BasicSweeper):
    """The product of all swept values, in order."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: the check composed and built every cell, and composing hundreds a second time takes minutes."""


ConfigStore.instance().store(group="hydra/sweeper", name="checked", node=CheckedSweeperConf, provider="steer_heal")
