"""A comparison of finished runs: rows of equal settings over seeds, their figures, and verdicts against a control.

It reads the runs' files alone. Runs of other weights, another dtype or trait, or other items are compared apart: their
figures have another zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steer_heal.config import ConfigError
from steer_heal.report.replicates import PRIMARY, NoItems, Replicates, settings
from steer_heal.report.run_folder import Run
from steer_heal.report.stats import NEAR, Estimate, Verdict, contrast, holm, verdict

SEED = "seed"
CONTROL = "nll"  # unless the user says otherwise
TEMPERED = "text_nll_t"  # damage with each model at the temperature that suits it
SECONDARY = ("text_nll_raw", "text_nll_turn")  # at the same gate: less is better
CLOSE = 0.002  # nats by which T* of two runs of a seed may differ, as a gain may miss it


@dataclass(frozen=True)
class Line:
    """A row of the comparison: its runs, and what may be said of them against the control."""

    row: Replicates
    trait: Estimate | None
    trait_for: Estimate | None
    trait_against: Estimate | None
    damage: Estimate | None
    at_target: Estimate | None  # damage at T*; None unless all runs reach it
    control: Replicates | None = None  # None of a control itself, or if there is none for it
    contrast: Estimate | None = None  # of damage at T*, less the control's
    adjusted: float | None = None  # its p-value after Holm
    verdict: Verdict | None = None  # None if there is nothing to compare with
    is_control: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows that share base, trait and items, best first."""

    basis: dict[str, str]  # what they share
    runs: list[Run]
    lines: list[Line]
    control: str  # what the others are compared with; empty if there is no such row
    compared: int  # rows in Holm's family
    left_out: int  # runs of the same settings and seed as another, with other figures


def compared(runs: Sequence[Run], by: Sequence[str] = (), against: str | None = None) -> list[Comparison]:
    """Comparisons of runs, one for each basis; rows by `by`, or by all that differs but the seed.

    `against` is a row's label, or settings such as `nll`; nll if None. Raises ConfigError for a key of `by` that no run
    sets, and for a control that is not there.
    """
    known = {key for run in runs for key in settings(run)}
    if unknown := [key for key in by if key not in known]:
        raise ConfigError(f"--by {unknown[0]}: no run was given it; there are {', '.join(sorted(known))}")
    apart: dict[str, list[Run]] = {}
    for run in runs:
        apart.setdefault(json.dumps(run.basis, sort_keys=True), []).append(run)
    made = [_comparison(some, by, against or CONTROL) for some in apart.values()]
    if against and not any(found.control for found in made):
        there = ", ".join(dict.fromkeys(line.row.label for found in made for line in found.lines))
        raise ConfigError(f"--against {against}: no row has that label or these settings; there are {there}")
    return made


def _comparison(runs: list[Run], by: Sequence[str], against: str) -> Comparison:
    rows, left_out = _rows(runs, by)
    controls = _controls(rows, against)
    lines = _judged([_line(row, control) for row, control in zip(rows, controls, strict=True)])
    serving = [line.row for line in lines if line.is_control]
    family = sum(line.adjusted is not None for line in lines)
    return Comparison(runs[0].basis, runs, _sorted(lines), against if serving else "", family, left_out)


def _rows(runs: Sequence[Run], by: Sequence[str]) -> tuple[list[Replicates], int]:
    """Rows of runs with equal settings, and the number of runs left out.

    Equivalent cells, such as nll at two values of lam, are one row, and the same cell counts once.
    """
    told = [settings(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in told for key in one) if key != SEED]
    chosen = list(by) or [key for key in keys if len({one.get(key) for one in told}) > 1]
    groups: dict[str, tuple[list[dict[str, str]], dict[str, list[Run]]]] = {}
    cells: dict[tuple[str, str], Run] = {}
    left_out = 0
    for run, one in zip(runs, told, strict=True):
        own, seed = {key: one[key] for key in chosen if key in one}, one.get(SEED, "0")
        told_of, found = groups.setdefault(json.dumps(own) if by else run.group, ([], {}))
        told_of.append(own)
        earlier = cells.setdefault((run.group, seed), run)
        if earlier is run:
            found.setdefault(seed, []).append(run)
        else:
            left_out += earlier.rounds != run.rounds
    return [Replicates(_shared(told_of), found) for told_of, found in groups.values() if found], left_out


def _shared(settings: Sequence[dict[str, str]]) -> dict[str, str]:
    """The settings that all have alike: where cells are equivalent, such as nll at two lam, the others say nothing."""
    return {key: value for key, value in settings[0].items() if all(one.get(key) == value for one in settings)}


def _controls(rows: Sequence[Replicates], against: str) -> list[Replicates | None]:
    """The control of each row: itself for a control, None if there is none.

    Candidates are rows with the settings `against`. One that is another row's counterpart, with the same settings but
    for the regulariser, is a control; where there is only one, rows without a counterpart are compared with it.
    """
    wanted = {("" if "=" in word else "reg=") + word for word in against.split()}
    candidates = [row for row in rows if wanted <= _told(row)]
    exact = [row for row in rows if row.label == against]
    if "=" in against and exact:  # a label with settings chooses one row for all
        return [exact[0]] * len(rows)

    def counterpart(row: Replicates) -> Replicates | None:
        rest = {run.rest for run in row.runs}
        return next((one for one in candidates if rest <= {run.rest for run in one.runs}), None)

    found = [None if _among(row, candidates) else counterpart(row) for row in rows]
    serving = [one for one in candidates if _among(one, found)] or exact or candidates
    alone = serving[0] if len(serving) == 1 else None
    return [row if _among(row, serving) else own or alone for row, own in zip(rows, found, strict=True)]


def _among(row: Replicates, some: Sequence[Replicates | None]) -> bool:
    return any(row is one for one in some)


def _told(row: Replicates) -> set[str]:
    own = {"reg": row.runs[0].regulariser} | row.settings if len(row.regularisers) == 1 else row.settings
    return {f"{key}={value}" for key, value in own.items()}


def _line(row: Replicates, control: Replicates | None) -> Line:
    trait, positive, negative = (row.figure("healed", "trait", n) for n in ("trait", "trait_for", "trait_against"))
    damage, at = row.figure("healed", "damage", PRIMARY), row.figure("matched", "damage", PRIMARY)
    itself = control is row
    return Line(row, trait, positive, negative, damage, at, None if itself else control, is_control=itself)


def _sorted(lines: list[Line]) -> list[Line]:
    """The least damage at matched trait first, then those that were not matched, the least damage first."""

    def key(line: Line) -> tuple[bool, float]:
        at = line.at_target or line.damage
        return line.at_target is None, at.value if at else float("inf")

    return sorted(lines, key=key)


def _judged(lines: list[Line]) -> list[Line]:
    """The lines with contrasts and verdicts, and whether these are robust."""
    tempered, secondary = _by(TEMPERED, lines), [[_contrast(line, name) for name in SECONDARY] for line in lines]
    judged = []
    for line, other, more in zip(_by(PRIMARY, lines), tempered, secondary, strict=True):
        main = line.verdict
        if main is not None and main.word in ("better", "worse", "equivalent"):
            turned = other.contrast is not None and other.verdict is not None and other.verdict.word != main.word
            main = replace(main, robust=not (turned or _opposed(main, more)))
        judged.append(replace(line, verdict=main))
    return judged


def _by(name: str, lines: list[Line]) -> list[Line]:
    """The lines with contrasts and verdicts by one figure of damage; Holm's family are all contrasts over seeds."""
    found = [_contrast(line, name) for line in lines]
    raw = {
        i: p for i, one in enumerate(found) if isinstance(one, Estimate) and one.seeds and (p := one.p()) is not None
    }
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    judged = []
    for i, (line, one) in enumerate(zip(lines, found, strict=True)):
        if isinstance(one, Estimate):
            said = _verdict(line, one, adjusted.get(i, 1.0), max(1, len(raw)))
            judged.append(replace(line, contrast=one, adjusted=adjusted.get(i), verdict=said))
        else:
            judged.append(replace(line, verdict=one))
    return judged


def _contrast(line: Line, name: str) -> Estimate | Verdict | None:
    """The contrast over the seeds that both have; else why there is none; None without a control."""
    row, control = line.row, line.control
    if control is None:
        return None
    if not (row.measured and control.measured):
        return Verdict("not matched")
    for one, whose in ((row, ""), (control, f"{control.label}, ")):
        if one.missed:
            return Verdict("not reached", f"{whose}{one.missed} of {len(one.runs)}")
    both = [seed for seed in row.seeds if seed in control.seeds]
    if not both:
        return Verdict("no verdict", "no seed in common")
    if any(abs(row.target(seed) - control.target(seed)) > CLOSE for seed in both):
        return Verdict("no verdict", "another T*")
    try:
        return contrast([row.at_target(seed, name) for seed in both], [control.at_target(seed, name) for seed in both])
    except NoItems:
        return Verdict("no verdict", "items are missing")
    except ValueError:
        return Verdict("no verdict", f"trait moves under {NEAR} nats")


def _verdict(line: Line, found: Estimate, adjusted: float, family: int) -> Verdict:
    both = found.seeds.df + 1 if found.seeds else 1
    said = verdict(found, adjusted, family, both)
    return replace(said, seeds=both if both < line.row.n and said.word != "no verdict" else 0)


def _opposed(main: Verdict, others: Sequence[Estimate | Verdict | None]) -> bool:
    """True if a secondary outcome speaks against a verdict, with a 95 % interval beyond 0."""
    sides: dict[str, Callable[[float, float], bool]] = {
        "better": lambda low, high: low > 0, "worse": lambda low, high: high < 0,
    }  # fmt: skip
    against = sides.get(main.word)
    intervals = [one.interval() for one in others if isinstance(one, Estimate)]
    return against is not None and any(against(*interval) for interval in intervals if interval)
