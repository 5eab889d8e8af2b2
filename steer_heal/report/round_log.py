"""Progress of a run, reported to the log and the tracker."""

from __future__ import annotations

from collections.abc import Mapping

from loguru import logger

from steer_heal.artifacts import Adapter, Completions, RoundFailed, Row, SteeringVector
from steer_heal.dose import DoseSearch, NoDose
from steer_heal.filter import Filter, TooFew
from steer_heal.heal.drift import Drift
from steer_heal.reg import Regulariser
from steer_heal.report.completions import FOLDER, counts, records
from steer_heal.report.diagnostics import diagnose, worst_positions
from steer_heal.result import Result, Round
from steer_heal.system.terminal import counted
from steer_heal.tracker import Tracker

CURVE_LINES = 20  # approximate number of lines that the log shows of a heal's curve


class RoundLog:
    """One method for each step of the loop."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.steps = 0  # optimiser steps of earlier rounds

    def vector(self, k: int, vector: SteeringVector, first: SteeringVector) -> None:
        """Log norm, signal-to-noise ratio and cosine to round 0's vector per block; nothing without a vector."""
        if not vector.layers:
            return
        figures = {"norm": vector.norms(), "snr": vector.snr, "cos_v0": vector.cosines(first)}
        columns, rows = ["layer", *figures], list(zip(vector.layers, *figures.values(), strict=True))
        for row in rows:
            named = {f"vector/{name}": value for name, value in zip(columns, row, strict=True)}
            self.tracker.log({"vector/round": k} | named)
        self.tracker.table(f"tables/vector of round {k}", columns, rows)
        low, high = vector.layers[0], vector.layers[-1]
        contiguous = vector.layers == tuple(range(low, high + 1))
        blocks = _span(low, high) if contiguous else ", ".join(map(str, vector.layers))
        spans = [_span(min(values), max(values)) for values in figures.values()]
        logger.info("vector at blocks {}: norm {}, signal to noise {}, cosine to round 0 {}", blocks, *spans)

    def dose_search(self, k: int, search: DoseSearch) -> None:
        """Log the trials of a search in order, and the doses that it found."""
        for i, trial in enumerate(search.trials):
            self.tracker.log({"dose/round": k, "dose/trial": i} | {f"dose/{name}": v for name, v in trial.items()})
            (figure,) = trial.keys() - {"alpha", "passed"}
            verdict = "passes" if trial["passed"] else "does not pass"
            logger.info("  dose {:.3g}: {} {:.3g}, {}", trial["alpha"], figure, trial[figure], verdict)
        if not search.trials:
            return
        if all(trial["passed"] for trial in search.trials):
            logger.warning("every dose that was tried passes: dose.most ended the search")
        if search.doses:
            logger.info("answers at {}", ", ".join(f"{dose:.3g}" for dose in dict.fromkeys(search.doses)))
        columns = list(search.trials[0])
        self.tracker.table(
            f"tables/doses of round {k}", columns, [[t[name] for name in columns] for t in search.trials]
        )

    def completions(self, k: int, found: Completions, filters: Mapping[str, Filter]) -> None:
        """Log how many completions passed and which filters the others failed, and write all into the run's folder."""
        rows = records(k, found, filters)
        self.tracker.records(f"{FOLDER}/round-{k}.jsonl", rows)
        logger.info("round {}: {}", k, counts(rows))

    def curve(self, given: Regulariser, reg: Regulariser, steps: int) -> CurveLog:
        """The log of a heal that is about to begin; `given` is the regulariser before its tau was in nats."""
        if given.percentile is not None and (tau := reg.metrics().get("tau")) is not None:
            logger.info("tau is {:.3g} nats, {} of training without a barrier", tau, f"p{given.percentile:g}")
        return CurveLog(reg, steps, self.tracker, offset=self.steps)

    def healed(self, curve: CurveLog, adapter: Adapter, drift: Drift) -> None:
        """Log the curve if it came from the store, and the diagnosis of it."""
        curve.replay(adapter)
        self.steps += len(adapter.curve)
        for sentence in [*diagnose(adapter, curve.reg), *worst_positions(drift)]:
            logger.info("  {}", sentence)

    def round(self, done: Round) -> None:
        """Log all figures of a round."""
        self.tracker.log({f"round/{name}": value for name, value in done.row.items()})
        self.tracker.histogram(f"divergence/round {done.index}", done.drift.of("kl_rev").tolist())
        names = ("trait", "damage", "coherence")
        row = done.row
        models = (" ".join([who, *(f"{name} {row[f'{who}/{name}']:.2f}" for name in names)]) for who in done.models)
        logger.info("round {}: {}", done.index, "; ".join(models))

    def failed(self, k: int, error: RoundFailed, filters: Mapping[str, Filter]) -> None:
        """Log the trials of a search that found no dose, and the completions of which too few passed.

        The error itself is logged where the run ends.
        """
        if isinstance(error, NoDose):
            self.dose_search(k, error.search)
        if isinstance(error, TooFew) and error.filtered is not None:
            self.completions(k, error.filtered, filters)

    def ended(self, result: Result) -> None:
        """Log why a run stopped early, and which round looks best where it is not the last."""
        if result.stopped:
            logger.warning("stopped early, {}", result.stopped)
        if result.best != len(result.rounds) - 1:
            logger.info("round {} has the highest trait gain minus damage, nat for nat; exploratory", result.best)
        logger.info("rounds done: {}", len(result.rounds))


class CurveLog:
    """Tracks every row of a heal's curve, and logs some of them below a line that says what to expect."""

    def __init__(self, reg: Regulariser, steps: int, tracker: Tracker, offset: int) -> None:
        self.reg, self.tracker, self.offset = reg, tracker, offset
        self.every, self.last, self.seen = max(1, round(steps / CURVE_LINES)), steps - 1, 0

    def __call__(self, row: Row) -> None:
        """Log a step as it is made."""
        if self.seen == 0:
            logger.info("healing with {}: expect that {}", self.reg.name, self.reg.expectation())
            logger.info("{:>6} {:>7} {:>7} {:>7} {:>7}", "step", "nll", "kl", "loss", "gnorm")
        if row["step"] % self.every == 0 or row["step"] == self.last:
            figures = [f"{round(row[name], 3) + 0.0:7.3f}" for name in ("nll", "kl", "loss", "gnorm")]
            logger.info("{:>6} {}", int(row["step"]), " ".join(figures))
        self._track(row)

    def replay(self, adapter: Adapter) -> None:
        """Track the rows that came from the store instead."""
        if self.seen == 0:
            steps = counted(len(adapter.curve), "step")
            logger.info("heal with {}: served from the store, {}", self.reg.name, steps)
        for row in adapter.curve[self.seen :]:
            self._track(row)

    def _track(self, row: Row) -> None:
        self.seen += 1
        step = {"heal/step": self.offset + row["step"]}
        self.tracker.log(step | {f"heal/{name}": value for name, value in row.items() if name != "step"})


def _span(low: float, high: float) -> str:
    """Both ends of a range, or one if they are equal."""
    return " to ".join(dict.fromkeys([f"{low:.3g}", f"{high:.3g}"]))
