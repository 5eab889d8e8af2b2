"""Configuration as a command line composes it, without running anything."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from steer_heal.config import CONF, build
from steer_heal.experiment import Experiment


def composed(*overrides: str) -> Experiment:
    """The experiment that a command line gives, without running it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", list(overrides))
    OmegaConf.set_struct(cfg, False)
    experiment = build(cfg)
    assert isinstance(experiment, Experiment)
    return experiment
