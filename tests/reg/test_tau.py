"""tau as a percentile of what training without a barrier reaches: fixed in round 0, kept, and computed once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compose import composed
from helpers.replay import Recording
from helpers.toys import by_hand, logits_of
from torch.distributions import Categorical, kl_divergence

from steer_heal.artifacts import Completions
from steer_heal.config import ConfigError
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.loop import run
from steer_heal.reg import Barrier
from steer_heal.reg.kl_rev import KlRev
from steer_heal.report import run_folder as results
from steer_heal.result import Result
from steer_heal.store.keys import fingerprint
from steer_heal.tracker.jsonl import JsonlConfig

TINY = "experiment=tiny"


class Cells:
    """Runs that share a store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, *overrides: str) -> tuple[Result, Recording]:
        exp = composed(TINY, *overrides)
        store = Recording(self.root / "store", exp)
        with JsonlConfig(name="jsonl").open(self.root, config={}, group=None, run_name="tau") as tracker:
            return run(exp, store, tracker), store


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Runs with a cell of nll in the store."""
    made = Cells(tmp_path_factory.mktemp("tau"))
    made("reg=nll")
    return made


def trained(store: Recording) -> Counter[str]:
    """Number of heals and drifts that were computed, not found in the store."""
    return Counter(stage for stage in store.computed if stage.startswith("heal."))


def reached(cells: Cells, tiny: Base, reg: str, how: str) -> list[float]:
    """The nll cell's divergence per training text, from full logits, torch.distributions and numpy."""
    result, store = cells("reg=nll")
    filtered = store.made["train.filtered 0"]
    assert isinstance(filtered, Completions)
    models = [by_hand(Student(tiny).learn(result.rounds[0].adapter)), tiny.model]
    found = []
    for row in filtered.kept():
        here = slice(len(row.prompt_ids) - 1, -1)
        q, p = (Categorical(logits=logits_of(model, *row.prompt_ids, *row.ids)[here]) for model in models)
        d = (kl_divergence(q, p) if reg == "kl_rev" else kl_divergence(p, q)).double().numpy()
        found.append(float(np.max(d) if how == "max" else np.mean(d)))
    return found


@pytest.mark.parametrize(("reg", "tau", "how"), [("kl_rev", 75, "mean"), ("kl_fwd", 90, "mean"), ("kl_rev", 99, "max")])
def test_tau_is_a_percentile_of_what_nll_reaches(cells: Cells, tiny: Base, reg: str, tau: int, how: str) -> None:
    """Reference: numpy's percentile of the nll cell's divergences, one a text, by the same aggregator."""
    if how != "mean":
        cells("reg=nll", f"heal.agg={how}")
    free = reached(cells, tiny, reg, how)
    result, _ = cells(f"reg={reg}", f"tau=p{tau}", f"heal.agg={how}")
    settled = result.rows[0]["tau"]
    assert settled == pytest.approx(np.percentile(free, tau), rel=1e-4), f"tau is {settled} of {sorted(free)}"
    assert settled != pytest.approx(np.percentile(free, tau - 8), rel=5e-3), "this test cannot tell percentiles apart"
    other = reached(cells, tiny, "kl_fwd" if reg == "kl_rev" else "kl_rev", how)
    assert settled != pytest.approx(np.percentile(other, tau), rel=2e-4), "this test cannot tell the directions apart"
    for row in result.rounds[0].adapter.curve:
        assert (row["loss"] > row["nll"]) == (row["barrier_on"] > 0), f"step {row['step']}: the barrier is not at tau"


def test_tau_is_settled_in_round_0_and_kept(tmp_path: Path) -> None:
    """Reference: the heals: a free one, then one per round; round 1 fixes nothing. Each has its drift."""
    cells = Cells(tmp_path)
    result, store = cells("reg=kl_rev", "tau=p60", "n_rounds=2")
    first, second = (row["tau"] for row in result.rows)
    assert first == second, f"tau was {first} and became {second}"
    expected = {"heal.heal": 3, "heal.drift.drift": 3, "heal.reference.reference_states": 2}
    assert trained(store) == expected, f"computed {trained(store)}"
    by_number, store = cells("reg=kl_rev", f"tau={first!r}", "n_rounds=2")
    assert [r.adapter.key for r in by_number.rounds] == [r.adapter.key for r in result.rounds], (
        "the number gives another result"
    )
    assert not trained(store), f"the number is computed anew: {trained(store)}"


def test_auto_is_p50(cells: Cells) -> None:
    """Reference: the keys of p50, of the cell and of all that is made."""
    one, other = (composed(TINY, f"tau={tau}") for tau in ("auto", "p50"))
    assert fingerprint(one) == fingerprint(other), "the cells are not the same"
    assert fingerprint(one) != fingerprint(composed(TINY, "tau=p51")), "all percentiles are the same"
    auto, _ = cells("tau=auto")
    p50, store = cells("tau=p50")
    assert not store.computed, f"p50 after auto computes {store.computed}"
    assert [r.adapter.key for r in auto.rounds] == [r.adapter.key for r in p50.rounds]


@pytest.mark.parametrize("order", [("nll", "kl_rev", "kl_fwd"), ("kl_fwd", "nll", "kl_rev")])
def test_a_sweep_trains_without_a_barrier_once(tmp_path: Path, order: tuple[str, ...]) -> None:
    """Reference: three cells, three heals; the free one of a barrier is the nll cell's own, whichever came first."""
    made = Cells(tmp_path)
    found = {reg: made(f"reg={reg}", "tau=auto") for reg in order}
    total = sum((trained(store) for _, store in found.values()), Counter[str]())
    assert total["heal.heal"] == 3, f"{total['heal.heal']} heals in the order {order}"
    assert total["heal.reference.reference_states"] == 1, "the reference's states were computed more than once"
    free = found["nll"][0].rounds[0].adapter.key
    for reg in ("kl_rev", "kl_fwd"):
        assert free in found[reg][1].used, f"{reg} settled tau from another heal than nll's"
    assert len({result.rounds[0].adapter.key for result, _ in found.values()}) == 3, "two cells are one"


def test_cells_of_another_strength_share_the_free_drift(cells: Cells) -> None:
    """Reference: of a second cell its own heal and drift alone; tau is the same number."""
    one, _ = cells("reg=kl_rev", "tau=p30", "lam=0.5")
    other, store = cells("reg=kl_rev", "tau=p30", "lam=2")
    assert trained(store) == {"heal.heal": 1, "heal.drift.drift": 1}, f"computed {trained(store)}"
    assert one.rows[0]["tau"] == other.rows[0]["tau"]
    _, store = cells("reg=kl_rev", "tau=p40", "lam=2")
    assert trained(store) == {"heal.heal": 1, "heal.drift.drift": 1}, f"another percentile computed {trained(store)}"


def test_a_number_trains_nothing_on_the_side(tmp_path: Path) -> None:
    """Reference: one heal, one drift."""
    _, store = Cells(tmp_path)("reg=kl_rev", "tau=0.01")
    assert trained(store) == {"heal.heal": 1, "heal.drift.drift": 1, "heal.reference.reference_states": 1}


def test_the_result_shows_the_number(cells: Cells, tmp_path: Path) -> None:
    """Reference: the tau that the round was trained with; the overrides hold the requested one."""
    result, store = cells("reg=kl_rev", "tau=p75")
    exp = composed(TINY, "reg=kl_rev", "tau=p75")
    (tmp_path / "metrics.jsonl").touch()
    shown = results.write(tmp_path, exp, store, result, overrides=["tau=p75"], seconds=1.0)
    record = json.loads((tmp_path / "result.json").read_text())
    settled = result.rows[0]["tau"]
    assert (record["tau"], record["rounds"][0]["tau"], shown["round/tau"]) == (settled, settled, settled)
    (read,) = results.read(tmp_path)
    assert (read.tau, read.overrides) == (settled, ("tau=p75",))
    assert len(record["worst"][0]) > 0, "no places of this round's drift are shown"


def test_without_a_barrier_there_is_no_tau(cells: Cells, tmp_path: Path) -> None:
    """Reference: none in the round's row and none in the file, whatever the command line says."""
    result, store = cells("reg=nll", "tau=auto")
    assert "tau" not in result.rows[0]
    results.write(tmp_path, composed(TINY, "reg=nll", "tau=auto"), store, result, overrides=[], seconds=1.0)
    assert json.loads((tmp_path / "result.json").read_text())["tau"] is None


@pytest.mark.parametrize("given", ["p0", "p100", "p07", "p", "P50", "p50.5", "-1", "x", "nan", "inf", "1e999", "[0.1]"])
@pytest.mark.parametrize("reg", ["kl_rev", "nll"])
def test_what_is_no_tau_is_refused_in_one_line(given: str, reg: str) -> None:
    """Reference: the field, the value as given, and all that is allowed; also for nll, which reads no tau."""
    with pytest.raises(ConfigError) as refused:
        composed(TINY, f"reg={reg}", f"tau={given}")
    field, _, allowed = str(refused.value).partition(" is not allowed: ")
    name, _, value = field.partition("=")
    assert name == ("reg.tau" if reg == "kl_rev" else "tau"), f"the field is {name}"
    assert value in (given, repr(given), repr(float("inf"))), f"the value is shown as {value}"
    assert allowed == "must be a number >= 0, auto, or a percentile p1 to p99"


def test_a_truth_value_is_no_tau() -> None:
    """Reference: `tau=true` is a mistake, not 1."""
    with pytest.raises(ConfigError, match="not a truth value"):
        composed(TINY, "tau=true")


@pytest.mark.parametrize(
    ("given", "percentile", "limit"),
    [("0", None, 0.0), ("1", None, 1.0), ("0.25", None, 0.25), ("p1", 1, None), ("p99", 99, None), ("auto", 50, None)],
)
def test_what_is_a_tau_is_taken(given: str, percentile: float | None, limit: float | None) -> None:
    """Reference: its meaning; before it is fixed nothing can be measured against it."""
    reg = composed(TINY, f"tau={given}").reg
    assert isinstance(reg, Barrier)
    assert reg.percentile == percentile
    if limit is not None:
        assert reg.tau_nats == limit
        return
    with pytest.raises(TypeError, match=f"tau={given} is not fixed"):
        _ = reg.tau_nats


def test_settling_takes_what_it_is_given() -> None:
    """Reference: the 75th percentile of 0 to 4 is 3, by hand; a fixed tau stays."""
    free = torch.tensor([4.0, 0.0, 2.0, 1.0, 3.0])
    settled = KlRev(name="kl_rev", lam=1.0, tau="p75").with_tau_from(free)
    assert (settled.tau_nats, settled.percentile, settled.lam) == (3.0, None, 1.0)
    assert settled.with_tau_from(free * 10).tau_nats == 3.0, "it was settled twice"
