"""Shared fixtures: composed configuration, the tiny model, and an order with the fast tests first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.compose import composed
from loguru import logger

from steer_heal.experiment import Experiment
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.model import load
from steer_heal.system.terminal import warn_once

THREADS = torch.get_num_threads()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="what is skipped counts as failed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run fast tests first, to show simple breakage at once; then the longest, to keep both workers busy."""
    items.sort(key=lambda item: -slow.args[0] if (slow := item.get_closest_marker("slow")) else -math.inf)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models are quicker on one thread, and five times so while something else runs on the machine."""
    torch.set_num_threads(THREADS if item.get_closest_marker("slow") else 1)


@pytest.fixture
def experiment() -> Callable[..., Experiment]:
    """A function from overrides to an experiment."""
    return composed


@pytest.fixture(scope="session")
def tiny() -> Base:
    """The random four-block model."""
    base = load(composed("experiment=tiny").model)
    _shared.append(base)
    return base


@pytest.fixture(autouse=True)
def _nothing_changes_the_tiny_model() -> Iterator[None]:
    """The test that leaves the shared model changed fails, and not a later one."""
    yield
    for base in _shared:
        base.check_pristine()


_shared: list[Base] = []


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """An empty place for stage results."""
    return tmp_path / "store"


def _logged(level: str) -> Iterator[list[str]]:
    warn_once.cache_clear()  # what an earlier test was told, this one is too
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level=level)
    yield seen
    logger.remove(sink)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Everything logged as a warning or worse."""
    yield from _logged("WARNING")


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Everything logged for people."""
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
    from helpers.toys import adapter

    return Student(tiny).learn(adapter(tiny, 1, size=0.15))
