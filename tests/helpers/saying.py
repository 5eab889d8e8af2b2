"""The command run inside this process, without a network, and its output."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import constants
from hydra.core.global_hydra import GlobalHydra
from loguru import logger

from steer_heal import main, model
from steer_heal.model import hub, smollm2_135m


@dataclass(frozen=True)
class Said:
    """Output and files of a command, run in an empty folder of its own."""

    code: object
    out: str
    err: str
    made: list[str]  # in the folder that it was given in

    def refused(self, *parts: str, notices: int = 0) -> str:
        """The one line of a well-formed refusal, which contains `parts`; log lines before it must be announced."""
        assert self.code == 2, f"exit status {self.code}: {self.err[-2000:]}"
        assert self.out == ""
        assert "Traceback" not in self.err
        *before, line = self.err.splitlines()
        assert len(before) == notices, f"{len(before) + 1} lines: {self.err}"
        assert line.startswith("steer_heal: ")
        assert len(line) < 500, "a line that a person reads"
        for part in parts:
            assert part in line, f"{part!r} is not in {line!r}"
        assert self.made == [], "a run's folder or a store was left"
        return line


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The empty folder in which commands run."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("weights were loaded")


@pytest.fixture
def say(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], Said]]:
    """A function from a user's arguments of `python -m steer_heal.main` to the outcome.

    There is no network and no cached model, and whoever loads weights fails.
    """
    monkeypatch.chdir(here)
    for name, value in {"HYDRA_FULL_ERROR": "1", "TOKENIZERS_PARALLELISM": "false", "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)  # the first two are main's own: put back afterwards
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(model, "_ready", never)
    for kind in (hub.Hub, smollm2_135m.SmolLM2):
        monkeypatch.setattr(kind, "fetch", never)

    def said(typed: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["steer_heal", *shlex.split(typed)])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        code: object = 0
        try:
            main.main()
        except SystemExit as left:
            code = left.code
        finally:
            GlobalHydra.instance().clear()
            logger.remove()  # its sink is the stderr of this test
        out, err = capfd.readouterr()
        return Said(code, out, err, sorted(path.name for path in here.iterdir()))

    yield said
    logger.remove()
    model.load.cache_clear()  # a base that a preview asked for would never load
