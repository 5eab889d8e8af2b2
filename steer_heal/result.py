"""Results of a run: one record per round. `Round.row` is the one place that defines what a round logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from steer_heal.artifacts import Adapter, Completions, Metrics, NotFinite, Row, SteeringVector
from steer_heal.eval import Column, EvalInput, Who
from steer_heal.heal.drift import Drift
from steer_heal.match import Frontier
from steer_heal.reg import Regulariser


@dataclass(frozen=True)
class Evaluated:
    """A model's answers to the held-out prompts, and what each evaluation found."""

    given: EvalInput  # what the evaluations were given
    metrics: Mapping[str, Metrics]  # by evaluation

    @property
    def answers(self) -> Completions:
        """The model's answers to the held-out prompts."""
        return self.given.answers

    @property
    def values(self) -> Row:
        """The figures of all evaluations by name."""
        return {name: value for found in self.metrics.values() for name, value in found.values.items()}


@dataclass(frozen=True)
class Round:
    """Everything that one round produced."""

    index: int
    models: Mapping[Who, Evaluated]
    columns: Sequence[Column]  # of all evaluations
    vector: SteeringVector
    first: SteeringVector  # the vector of round 0
    completions: Completions  # filtered
    reg: Regulariser  # with tau in nats
    adapter: Adapter
    drift: Drift
    frontier: Frontier | None  # of the healed model; None if nothing is matched

    @cached_property
    def row(self) -> Row:
        """The figures of the round by name, those of a model as `<model>/<name>`.

        Raises ValueError and NotFinite for figures of a regulariser that are taken or not finite.
        """
        row: Row = {"index": self.index}
        base = self.models["base"].values
        for who, model in self.models.items():
            row |= {f"{who}/{name}": value for name, value in self._over(base, model.values).items()}
        row |= {n if n.startswith("heal_") else f"heal_{n}": value for n, value in self.adapter.summary.items()}
        row |= self._steering() | self._matched(base)
        own = self.reg.metrics()
        if taken := sorted(row.keys() & own.keys()):
            raise ValueError(f"reg={self.reg.name}: a round has figures called {', '.join(taken)} already")
        if odd := [name for name, value in own.items() if not math.isfinite(value)]:
            raise NotFinite(f"reg={self.reg.name}: not finite: {', '.join(odd)}")
        return row | own

    def _over(self, base: Row, values: Row) -> Row:
        """Figures, and those of `over_base` less base's."""
        differ = (c for c in self.columns if c.over_base and c.name in values and c.name in base)
        return values | {c.over_base: values[c.name] - base[c.name] for c in differ}

    def _matched(self, base: Row) -> Row:
        """The target, whether it was reached, and the gate and figures there; nothing if nothing is matched."""
        if self.frontier is None:
            return {}
        at, row = self.frontier.matched, {"target": self.frontier.target, "reached": 0.0}
        if at is not None:
            row |= {"reached": 1.0, "gate": at.gate} | self._over(base, at.values)
        return {f"matched/{name}": value for name, value in row.items()}

    def _steering(self) -> Row:
        """Counts, dose and vector, and the trait log-odds of kept and dropped completions under base."""
        rows, kept, passed = self.completions.rows, self.completions.kept(), self.completions.passed()
        dose = self.completions.mean_dose()
        row: Row = {"generated": len(rows), "passed": len(passed), "kept": len(kept), "dose": dose}
        if n := len(self.vector.layers):
            row |= {"vector_norm": sum(self.vector.norms()) / n, "vector_snr": sum(self.vector.snr) / n}
            row["cos_v0"] = self.vector.cosine(self.first)
        for name, some in (("kept", kept), ("dropped", [r for r in rows if r.reasons])):
            if some:
                row[f"{name}_trait"] = sum(r.scores["trait"] for r in some) / len(some)
        return row

    def frontier_rows(self) -> list[Row]:
        """Gate and figures of the frontier's points and of the matched one, by rising gate."""
        if self.frontier is None:
            return []
        base, found = self.models["base"].values, {point.gate: point for point in self.frontier.points}
        if self.frontier.matched is not None:
            found[self.frontier.matched.gate] = self.frontier.matched
        return [{"gate": gate} | self._over(base, found[gate].values) for gate in sorted(found)]


@dataclass
class Result:
    """The rounds of a run, and why it ended early, if it did."""

    rounds: list[Round] = field(default_factory=list)
    stopped: str = ""
    collapsed: bool = False  # the last round fell below the coherence floor

    @property
    def rows(self) -> list[Row]:
        """The figures of every round."""
        return [done.row for done in self.rounds]

    @property
    def best(self) -> int:
        """Index of the round with the highest trait gain minus damage, both in nats/token; not one that collapsed."""
        scores = [row["healed/trait"] - row["base/trait"] - row["healed/damage"] for row in self.rows]
        usable = range(len(scores) - 1 if self.collapsed and len(scores) > 1 else len(scores))
        return max(usable, key=lambda k: scores[k])
