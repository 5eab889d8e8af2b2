"""Tracked runs in isolation: no user settings, and a W&B server only on request."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.wandb_stub import WandbStub
from steer_heal.tracker import Tracker, TrackerConfig
from steer_heal.tracker.wandb import WandbConfig

HEAL_ROWS = [{"heal/step": step, "heal/nll": 3.0 - step / 10, "heal/kl": 0.0} for step in range(20)]
ENDS_S = 90  # far above what any test takes: it tells a hang from a slow machine


def wandb_option(**fields: Any) -> WandbConfig:
    """The option of conf/tracker/wandb.yaml with some fields replaced."""
    held = {"name": "wandb", "project": "steer_heal", "entity": None, "mode": "auto", "tags": ()}
    return WandbConfig(**(held | fields))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B settings of the user, no network but the loopback, no leftovers, and a time limit for every test."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    before = {name for name in os.environ if name.startswith("WANDB_")}

    def hung(*_: object) -> None:
        raise AssertionError(f"still not done after {ENDS_S} s")

    previous = signal.signal(signal.SIGALRM, hung)
    signal.alarm(ENDS_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert {name for name in os.environ if name.startswith("WANDB_")} - before <= {"WANDB_API_KEY", "WANDB_MODE"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """A W&B server and a key for it."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        yield stub


def begin(options: TrackerConfig, run_dir: Path, **config: Any) -> Tracker:
    return options.open(run_dir, config=config, group="sweep", run_name="reg=nll")


def read(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a run without their times; anything but strict JSON is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / name).read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all(row.pop("time") >= 0 for row in rows)
    return rows


def picture(folder: Path) -> Path:
    from PIL import Image

    path = folder / "curve.png"
    Image.new("RGB", (2, 2)).save(path)
    return path
