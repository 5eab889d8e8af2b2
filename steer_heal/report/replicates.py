"""Finished runs as a comparison reads them: from any number of folders, and grouped over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from steer_heal.artifacts import Row
from steer_heal.config import ConfigError
from steer_heal.report.run_folder import SWEEP, Run, read, read_items
from steer_heal.report.stats import Estimate, Matched, Point, estimate, slope

PRIMARY = "text_nll"  # damage


class NoItems(ConfigError):
    """A run without the items that a figure is made of."""


def gathered(paths: Sequence[Path]) -> list[Run]:
    """Finished runs of any number of runs, sweeps and folders of these, each once, in the order given.

    Raises ConfigError for a folder that holds none of them. Below it, what cannot be read is left out with a warning.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        places = list(_places(path))
        if not places:
            raise ConfigError(f"{path}: neither a run nor a sweep, nor a folder of these")
        for place in places:
            try:
                runs = read(place)
            except ConfigError as error:
                if place == path:
                    raise
                logger.warning("{}; it is left out", error)
                continue
            for run in runs:
                found.setdefault(run.folder.resolve(), run)
    return list(found.values())


def _places(path: Path) -> Iterator[Path]:
    """Yield the runs and sweeps at or below a folder."""
    if (path / "result.json").is_file() or (path / SWEEP).is_file():
        yield path
        return
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        logger.warning("{}: {}; it is left out", path, error.strerror or error)
        return
    for below in inside:
        if below.is_dir() and not below.name.startswith("."):
            yield from _places(below)


def settings(run: Run) -> dict[str, str]:
    """What a run was told, by key; the regulariser first."""
    split = (override.lstrip("+").partition("=") for override in run.overrides)
    return {"reg": run.regulariser} | {key: value for key, _, value in split if key != "reg"}


def over_base(run: Run, who: str, evaluation: str, name: str) -> NDArray[np.float64]:
    """A model's figures of the items of the last round over base's [i], by item id. Raises NoItems."""
    try:
        base, own = (read_items(run.folder, one, evaluation, len(run.rounds) - 1) for one in ("base", who))
        values = [own[i][name] - base[i][name] for i in sorted(base)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoItems(f"{run.folder}: items of {evaluation} of {who} cannot be read: {error}") from None
    if not own or len(own) != len(base):
        raise NoItems(f"{run.folder}: no items of {evaluation} of {who}")
    return np.array(values)


def matched(run: Run, name: str = PRIMARY) -> Matched:
    """A run's student at T*, its damage by the figure `name`.

    Raises NoItems if its items lack that, and ValueError if its trait moves too little for a slope.
    """
    target, points = run.headline["matched/target"], [Point(0.0, 0.0)]
    gains, damage = over_base(run, "matched", "trait", "trait"), over_base(run, "matched", "damage", name)
    for row in run.frontier:
        if name not in row or f"base/{name}" not in run.headline:
            raise NoItems(f"{run.folder}: its frontier has no {name}")
        points.append(Point(row["trait"] - run.headline["base/trait"], row[name] - run.headline[f"base/{name}"]))
    return Matched(target, gains, damage, slope(points, target))


@dataclass(frozen=True)
class Replicates:
    """Runs of equal settings, by seed: a row of the table. With `by` a seed may have several, which are averaged."""

    settings: dict[str, str]  # what tells the row from others, by key
    seeds: dict[str, list[Run]]

    @property
    def runs(self) -> list[Run]:
        return [run for some in self.seeds.values() for run in some]

    @property
    def label(self) -> str:
        """The regulariser, then the other settings."""
        told = [value if key == "reg" else f"{key}={value}" for key, value in self.settings.items()]
        return " ".join(told) or self.runs[0].regulariser

    @property
    def regularisers(self) -> set[str]:
        return {run.regulariser for run in self.runs}

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.seeds)

    def figure(self, who: str, evaluation: str, name: str) -> Estimate | None:
        """A figure over base's with its variance; None where the runs do not all have the same items of it."""
        try:
            values = [
                np.mean([over_base(run, who, evaluation, name) for run in some], axis=0) for some in self.seeds.values()
            ]
            return estimate(np.array(values, dtype=np.float64))
        except ValueError:  # also NoItems; or not as many items in each
            return None

    def at_target(self, seed: str, name: str) -> Matched:
        """A seed's student at T*, the mean of its runs. Raises NoItems and ValueError as `matched`."""
        found = [matched(run, name) for run in self.seeds[seed]]
        gains, damage = (np.mean([getattr(one, field) for one in found], axis=0) for field in ("gains", "damage"))
        target, steep = (float(np.mean([getattr(one, field) for one in found])) for field in ("target", "slope"))
        return Matched(target, gains, damage, steep)

    def target(self, seed: str) -> float:
        """T* of a seed, nats/token; the mean of its runs'."""
        return float(np.mean([run.headline["matched/target"] for run in self.seeds[seed]]))

    @property
    def seconds(self) -> float:
        """Of a run, the mean."""
        return sum(run.seconds for run in self.runs) / len(self.runs)

    @property
    def gate(self) -> float | None:
        """The mean gate of the runs that reach T*."""
        gates = [run.headline["matched/gate"] for run in self.runs if "matched/gate" in run.headline]
        return sum(gates) / len(gates) if gates else None

    @cached_property
    def missed(self) -> int:
        """Number of runs that do not reach T*."""
        return sum(run.headline.get("matched/reached") == 0 for run in self.runs)

    @property
    def measured(self) -> bool:
        """True if every run was matched, whether or not it reached T*."""
        return all("matched/target" in run.headline for run in self.runs)


def frontier(run: Run) -> list[Row]:
    """A run's frontier over base: gate, trait and damage, from base on."""
    zero = run.headline
    rows = [{"gate": 0.0, "trait": 0.0, "damage": 0.0}]
    for row in run.frontier:
        gain, damage = row["trait"] - zero["base/trait"], row[PRIMARY] - zero[f"base/{PRIMARY}"]
        rows.append({"gate": row["gate"], "trait": gain, "damage": damage})
    return sorted(rows, key=lambda row: row["gate"])
