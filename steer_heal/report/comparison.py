"""A comparison of finished runs: rows of equal settings over seeds, their figures, and verdicts against a control.

It reads the runs' files alone. Runs of other weights, another dtype or trait, or other items are compared apart: their
figures have another zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steer_heal.artifacts import Row
from steer_heal.config import ConfigError
from steer_heal.report.run_folder import SWEEP, Run, read, read_items
from steer_heal.report.stats import (
    NEAR,
    Estimate,
    Matched,
    Point,
    Verdict,
    contrast,
    estimate,
    holm,
    slope,
    verdict,
)

SEED = "seed"
PRIMARY, TEMPERED = "text_nll", "text_nll_t"  # damage, and with each model at the temperature that suits it
SECONDARY = ("text_nll_raw", "text_nll_turn")  # at the same gate: less is better
IN_TURN = "text_nll_turn"  # all that a persona as system message can damage


def gathered(paths: Sequence[Path]) -> list[Run]:
    """Finished runs of any number of runs, sweeps and folders of these, each once, in the order given.

    Raises ConfigError for a folder that holds none of them.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        places = list(_places(path))
        if not places:
            raise ConfigError(f"{path}: neither a run nor a sweep, nor a folder of these")
        for place in places:
            for run in read(place):
                found.setdefault(run.folder.resolve(), run)
    return list(found.values())


def _places(path: Path) -> Iterator[Path]:
    """Yield the runs and sweeps at or below a folder."""
    if (path / "result.json").is_file() or (path / SWEEP).is_file():
        yield path
    elif path.is_dir():
        for below in sorted(path.iterdir()):
            if below.is_dir() and not below.name.startswith("."):
                yield from _places(below)


def settings(run: Run) -> dict[str, str]:
    """What a run was told, by key; the regulariser first."""
    split = (override.lstrip("+").partition("=") for override in run.overrides)
    return {"reg": run.regulariser} | {key: value for key, _, value in split if key != "reg"}


@dataclass(frozen=True)
class Replicates:
    """Runs of equal settings that differ in their seed, or in what was averaged over: a row of the table."""

    settings: dict[str, str]  # what tells the row from others, by key
    runs: dict[str, Run]  # by replicate, such as `seed=3`

    @property
    def label(self) -> str:
        """The regulariser, then the other settings."""
        told = [value if key == "reg" else f"{key}={value}" for key, value in self.settings.items()]
        return " ".join(told) or next(iter(self.runs.values())).regulariser

    @property
    def own(self) -> dict[str, str]:
        """The settings, with the regulariser also where all rows have the same."""
        return {"reg": next(iter(self.runs.values())).regulariser} | self.settings

    @property
    def n(self) -> int:
        return len(self.runs)

    def items(self, who: str, evaluation: str, name: str) -> NDArray[np.float64]:
        """An evaluation's items over base's, of the last round [s, i]; raises ConfigError if a run has none."""
        return np.array([over_base(run, who, evaluation, name) for run in self.runs.values()])

    def figure(self, who: str, evaluation: str, name: str) -> Estimate | None:
        """A figure over base's with its variance; None where the runs do not all have it."""
        try:
            return estimate(self.items(who, evaluation, name))
        except ConfigError:
            return None

    @property
    def seconds(self) -> float:
        """Of a run, the mean."""
        return sum(run.seconds for run in self.runs.values()) / self.n

    @property
    def gates(self) -> list[float | None]:
        """Each run's gate at T*; None: not reached, or not measured."""
        return [run.headline.get("matched/gate") for run in self.runs.values()]

    @cached_property
    def missed(self) -> list[str]:
        """Replicates that do not reach T*."""
        return [name for name, run in self.runs.items() if run.headline.get("matched/reached") == 0]

    @property
    def measured(self) -> bool:
        """True if every run was matched, whether or not it reached T*."""
        return all("matched/target" in run.headline for run in self.runs.values())


def over_base(run: Run, who: str, evaluation: str, name: str) -> NDArray[np.float64]:
    """A model's figures of the items of the last round over base's [i]. Raises ConfigError if the run lacks them."""
    base, own = (read_items(run.folder, one, evaluation, len(run.rounds) - 1) for one in ("base", who))
    if not own or own.keys() != base.keys() or any(name not in row for row in (*own.values(), *base.values())):
        raise ConfigError(f"{run.folder}: no items of {evaluation} of {who}")
    return np.array([own[i][name] - base[i][name] for i in base])


def matched(run: Run, name: str = PRIMARY) -> Matched:
    """A run's student at T*, its damage by the figure `name`.

    Raises ConfigError if it was not measured there, and ValueError if its trait moves too little for a slope.
    """
    target = run.headline["matched/target"]
    points = [Point(0.0, 0.0)]
    for row in run.frontier:
        points.append(Point(row["trait"] - run.headline["base/trait"], row[name] - run.headline[f"base/{name}"]))
    gains, damage = over_base(run, "matched", "trait", "trait"), over_base(run, "matched", "damage", name)
    return Matched(target, gains, damage, slope(points, target))


@dataclass(frozen=True)
class Line:
    """A row of the comparison: its runs, and what may be said of them against the control."""

    row: Replicates
    trait: Estimate | None
    trait_for: Estimate | None
    trait_against: Estimate | None
    damage: Estimate | None
    at_target: Estimate | None  # damage at T*, of the runs that reach it
    contrast: Estimate | None  # of damage at T*, less the control's; None for the control itself
    adjusted: float | None  # its p-value after Holm
    verdict: Verdict | None  # None if there is nothing to compare with
    is_control: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows that share base, trait and items, best first."""

    basis: dict[str, Any]  # what they share
    runs: list[Run]
    lines: list[Line]
    control: str  # what the others are compared with; empty if there is no such row
    compared: int  # rows in Holm's family


def compared(runs: Sequence[Run], by: Sequence[str] = (), against: str = "nll") -> list[Comparison]:
    """Comparisons of runs, one for each basis; rows by `by`, or by all that differs but the seed.

    Raises ConfigError for a key of `by` that no run sets.
    """
    known = {key for run in runs for key in settings(run)}
    if unknown := [key for key in by if key not in known]:
        raise ConfigError(f"--by {unknown[0]}: no run was given it; there are {', '.join(sorted(known))}")
    apart: dict[str, list[Run]] = {}
    for run in runs:
        apart.setdefault(json.dumps(run.basis, sort_keys=True), []).append(run)
    return [_comparison(some, by, against) for some in apart.values()]


def _comparison(runs: list[Run], by: Sequence[str], against: str) -> Comparison:
    rows = _rows(runs, by)
    candidates = _candidates(rows, against)
    lines = _judged([_line(row) for row in rows], [_control(row, candidates) for row in rows])
    lines = [replace(line, is_control=line.row in candidates) for line in lines]
    family = sum(line.adjusted is not None for line in lines)
    return Comparison(runs[0].basis, runs, _sorted(lines), against if candidates else "", family)


def _candidates(rows: Sequence[Replicates], against: str) -> list[Replicates]:
    """The row of that label; else all rows that have its settings, such as nll at each rank."""
    if exact := [row for row in rows if row.label == against]:
        return exact
    wanted = {("" if "=" in word else "reg=") + word for word in against.split()}
    return [row for row in rows if wanted <= {f"{key}={value}" for key, value in row.own.items()}]


def _control(row: Replicates, candidates: Sequence[Replicates]) -> Replicates | None:
    """The candidate that differs from a row in its regulariser alone, if there are several; None for one of them."""
    if any(row is one for one in candidates) or len(candidates) <= 1:
        return None if any(row is one for one in candidates) else next(iter(candidates), None)
    alike = [one for one in candidates if all(row.own.get(k) == v for k, v in one.settings.items() if k != "reg")]
    return alike[0] if len(alike) == 1 else None


def _rows(runs: Sequence[Run], by: Sequence[str]) -> list[Replicates]:
    """Runs with equal settings; equivalent cells, such as nll at two values of lam, are one row and one replicate."""
    told = [settings(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in told for key in one) if key != SEED]
    differing = [key for key in keys if len({one.get(key) for one in told}) > 1]
    chosen = list(by) or differing
    rest = [key for key in (*differing, SEED) if key not in chosen]
    groups: dict[str, tuple[list[dict[str, str]], dict[str, Run]]] = {}
    for run, one in zip(runs, told, strict=True):
        own = {key: one[key] for key in chosen if key in one}
        name = " ".join(f"{key}={one.get(key, '0' if key == SEED else '')}" for key in rest)
        group = json.dumps(own) if by else run.group
        told_of, found = groups.setdefault(group, ([], {}))
        told_of.append(own)
        found.setdefault(name, run)
    return [Replicates(_shared(told_of), found) for told_of, found in groups.values()]


def _shared(settings: Sequence[dict[str, str]]) -> dict[str, str]:
    """The settings that all have alike: where cells are equivalent, such as nll at two lam, the others say nothing."""
    return {key: value for key, value in settings[0].items() if all(one.get(key) == value for one in settings)}


def _line(row: Replicates) -> Line:
    trait, positive, negative = (row.figure("healed", "trait", n) for n in ("trait", "trait_for", "trait_against"))
    damage, at = row.figure("healed", "damage", PRIMARY), row.figure("matched", "damage", PRIMARY)
    return Line(row, trait, positive, negative, damage, at, None, None, None)


def _sorted(lines: list[Line]) -> list[Line]:
    """The least damage at matched trait first, then those that were not matched, the least damage first."""

    def key(line: Line) -> tuple[bool, float]:
        at = line.at_target or line.damage
        return line.at_target is None, at.value if at else float("inf")

    return sorted(lines, key=key)


def _judged(lines: list[Line], controls: list[Replicates | None]) -> list[Line]:
    """The lines with contrasts and verdicts; Holm's family are all that have a contrast."""
    pairs = [(line.row, control) for line, control in zip(lines, controls, strict=True)]
    found = {name: [_contrast(*pair, name) for pair in pairs] for name in (PRIMARY, TEMPERED, *SECONDARY)}
    verdicts = {name: _verdicts(pairs, found[name]) for name in (PRIMARY, TEMPERED)}
    adjusted = _adjusted(found[PRIMARY])
    judged = []
    for i, line in enumerate(lines):
        main, other = verdicts[PRIMARY][i], verdicts[TEMPERED][i]
        if main is not None:
            turned = other is not None and main.word in ("better", "worse", "equivalent") and other.word != main.word
            main = replace(main, robust=not (turned or _opposed(main, [found[name][i] for name in SECONDARY])))
        judged.append(replace(line, contrast=found[PRIMARY][i], adjusted=adjusted[i], verdict=main))
    return judged


def _contrast(row: Replicates, control: Replicates | None, name: str) -> Estimate | None:
    """The contrast over the replicates that both have; None without a control, or if not all reach T*."""
    if control is None:
        return None
    both = [key for key in row.runs if key in control.runs]
    if not both or not (row.measured and control.measured) or row.missed or control.missed:
        return None
    try:
        pairs = [(matched(row.runs[key], name), matched(control.runs[key], name)) for key in both]
    except ValueError:
        return None
    if any(_target(row.runs[key]) != _target(control.runs[key]) for key in both):
        return None
    return contrast([a for a, _ in pairs], [b for _, b in pairs])


def _target(run: Run) -> float:
    return round(run.headline["matched/target"], 9)


def _adjusted(contrasts: Sequence[Estimate | None]) -> list[float | None]:
    """p-values after Holm, of those that have more than one seed."""
    raw = {i: p for i, one in enumerate(contrasts) if one and one.seeds and (p := one.p()) is not None}
    return [dict(zip(raw, holm(list(raw.values())), strict=True)).get(i) for i in range(len(contrasts))]


def _verdicts(
    pairs: Sequence[tuple[Replicates, Replicates | None]], contrasts: Sequence[Estimate | None]
) -> list[Verdict | None]:
    adjusted = _adjusted(contrasts)
    family = sum(p is not None for p in adjusted)
    return [
        None if control is None else _verdict(row, control, found, p, family)
        for (row, control), found, p in zip(pairs, contrasts, adjusted, strict=True)
    ]


def _verdict(
    row: Replicates, control: Replicates, found: Estimate | None, adjusted: float | None, family: int
) -> Verdict:
    """What may be said of a row."""
    if not (row.measured and control.measured):
        return Verdict("not matched")
    for one, whose in ((row, ""), (control, f"{control.label}, ")):
        if one.missed:
            return Verdict("not reached", f"{whose}{len(one.missed)} of {one.n}")
    both = len(row.runs.keys() & control.runs.keys())
    if not both:
        return Verdict("no verdict", "no seed in common")
    if found is None:
        alike = all(
            _target(row.runs[key]) == _target(control.runs[key]) for key in row.runs.keys() & control.runs.keys()
        )
        return Verdict("no verdict", f"trait moves under {NEAR} nats" if alike else "another T*")
    return verdict(found, 1.0 if adjusted is None else adjusted, max(1, family), both)


def _opposed(main: Verdict, others: Sequence[Estimate | None]) -> bool:
    """True if a secondary outcome speaks against a verdict, with a 95 % interval beyond 0."""
    sides = {"better": lambda low, high: low > 0, "worse": lambda low, high: high < 0}
    against: Callable[[float, float], bool] | None = sides.get(main.word)
    if against is None:
        return False
    return any(against(*interval) for one in others if one and (interval := one.interval()))


def unmeasured(runs: Sequence[Run]) -> list[str]:
    """What a reader should know of runs that have no matched point, and how to measure it."""
    lacking = [run for run in runs if "matched/target" not in run.headline]
    if not lacking:
        return _other_targets(runs)
    told = " ".join(lacking[0].overrides)
    return [
        f"{len(lacking)} of {len(runs)} runs were not measured at matched trait; all but that comes from the store: "
        f"python -m steer_heal.main {told} match=gate"
    ]


def _other_targets(runs: Sequence[Run]) -> list[str]:
    """How to give runs of one seed the same T*, if they have several."""
    targets: dict[str | None, set[float]] = {}
    for run in runs:
        targets.setdefault(settings(run).get(SEED), set()).add(_target(run))
    several = [sorted(found) for found in targets.values() if len(found) > 1]
    if not several:
        return []
    least = min(found[0] for found in several)
    return [
        f"runs of a seed have several T*, such as {several[0][0]:.3g} and {several[0][-1]:.3g}: to compare them, give all "
        f"the same in nats, such as match.at={least:.2g}; all but the gates comes from the store"
    ]


def frontier(run: Run) -> list[Row]:
    """A run's frontier over base: gate, trait and damage, from base on."""
    zero = run.headline
    rows = [{"gate": 0.0, "trait": 0.0, "damage": 0.0}]
    for row in run.frontier:
        gain, damage = row["trait"] - zero["base/trait"], row[PRIMARY] - zero[f"base/{PRIMARY}"]
        rows.append({"gate": row["gate"], "trait": gain, "damage": damage})
    return sorted(rows, key=lambda row: row["gate"])
