"""What tests share: composed configuration, the tiny model, and an order with the fast ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from loguru import logger
from omegaconf import OmegaConf

from steer_heal.config import CONF, build
from steer_heal.experiment import Experiment
from steer_heal.lm.student import Student
from steer_heal.model import Base, load

# In this order, at the end; the longest first, so that two workers end at about the same time.
SLOW_FILES = (
    "test_bundled.py",
    "test_slurm.py",
    "test_bundled_teachers.py",
    "test_faults_sweep.py",
    "test_faults_kill.py",
    "test_faults_disk.py",
    "test_sweep_again.py",
    "test_launchers.py",
    "test_sweep_folder.py",
    "test_sweep.py",
    "test_memory.py",
    "test_options.py",
    "test_cli.py",
    "test_packaging.py",
    "test_tracking_outages.py",
    "test_tracking.py",
    "test_refusals_sweep.py",
    "test_refusals.py",
)
THREADS = torch.get_num_threads()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="what is skipped counts as failed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first, so that what is simply broken is seen at once."""
    items.sort(key=lambda item: SLOW_FILES.index(item.path.name) if item.path.name in SLOW_FILES else -1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models are quicker on one thread, and five times so while something else runs on the machine."""
    torch.set_num_threads(THREADS if item.path.name in SLOW_FILES else 1)


def composed(*overrides: str) -> Experiment:
    """The experiment that a command line gives, without running it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", list(overrides))
    OmegaConf.set_struct(cfg, False)
    experiment = build(cfg)
    assert isinstance(experiment, Experiment)
    return experiment


@pytest.fixture
def experiment() -> Callable[..., Experiment]:
    """A function from overrides to an experiment."""
    return composed


@pytest.fixture(scope="session")
def tiny() -> Base:
    """The random four-block model."""
    return load(composed("experiment=tiny").model)


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """An empty place for stage results."""
    return tmp_path / "store"


def _logged(level: str) -> Iterator[list[str]]:
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level=level)
    yield seen
    logger.remove(sink)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What was logged as a warning or worse."""
    yield from _logged("WARNING")


@pytest.fixture
def told() -> Iterator[list[str]]:
    """All that was logged for people."""
    yield from _logged("INFO")


@pytest.fixture
def saved(tiny: Base, tmp_path: Path) -> Path:
    """A folder of the tiny model, as `save_pretrained` leaves it."""
    folder = tmp_path / "saved"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def second_round(tiny: Base) -> Student:
    """A student that has already learned something, so that it differs from base."""
    from toys import adapter

    return Student(tiny).learn(adapter(tiny, 1, size=0.15))
