"""Drift of a healed model from the reference: divergences at every position of the texts that it was trained on."""

from __future__ import annotations

from typing import ClassVar, Literal

from steer_heal.artifacts import Metrics, Row
from steer_heal.eval import Column, EvalInput, Evaluation, Who
from steer_heal.heal.drift import Drift
from steer_heal.lm.kl import spread
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime

DIRECTIONS = {"kl_fwd": "KL(reference || healed)", "kl_rev": "KL(healed || reference)"}


class DriftSpread(Evaluation, key="steer_heal.eval.drift.DriftSpread"):
    """Median, 95th percentile and maximum over all positions; an item is a text, with the mean over its positions."""

    columns: ClassVar = tuple(
        Column(f"{kl}_{name}", f"{about} per position of the training data, {how}", "nats", circular="reference")
        for kl, about in DIRECTIONS.items()
        for name, how in (("mean", "mean"), ("p50", "median"), ("p95", "95th percentile"), ("max", "maximum"))
    )
    models: ClassVar[tuple[Who, ...]] = ("healed",)
    name: Literal["drift"]

    def material(self, given: EvalInput) -> Drift:
        assert given.drift is not None  # of a healed model
        return given.drift

    def measure(self, subject: Subject, material: Drift, runtime: Runtime) -> Metrics:
        values: Row = {}
        items: dict[str, Row] = {i: {} for i in material.ids}
        for kl in DIRECTIONS:
            values |= spread(material.of(kl), kl)
            for i, value in zip(material.ids, material.per_text(kl, "mean").tolist(), strict=True):
                items[i][f"{kl}_mean"] = value
        return Metrics(values, items)
