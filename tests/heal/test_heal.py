"""Healing: its start, its curve, what it learns, and that it is reproducible."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import peft
import pytest
import torch
from helpers.toys import (
    RUNTIME,
    assert_alike,
    by_hand,
    healed,
    logits_of,
    lora,
    off,
    own_loss,
    regulariser,
    rows,
    runtime,
)

from steer_heal.artifacts import Adapter, Completions, Row
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.lora import factors, live_adapter

KINDS = ["nll", "kl_fwd", "kl_rev", "wd"]
MADE = rows(8)
IDS = tuple(range(20, 50))
STILL = 1e-30  # a learning rate at which nothing moves


@pytest.fixture(scope="module")
def heals(tiny: Base) -> dict[str, Adapter]:
    """One heal of eight steps with each regulariser, in which the barriers are reached."""
    return {kind: healed(Student(tiny), regulariser(kind, 1.0, 0.005), epochs=4) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_round_starts_as_base(kind: str, heals: dict[str, Adapter]) -> None:
    """Reference: B = 0, so every divergence is 0 up to rounding, in float32 at most 1e-6."""
    start = heals[kind].curve[0]
    for name in ("kl", "kl_fwd", "kl_rev"):
        assert abs(start[name]) <= 1e-6, f"{kind} starts at {name} = {start[name]}"
    assert start["loss"] == pytest.approx(start["nll"], abs=1e-6), "a barrier costs something at step 0"
    assert heals[kind].summary["kl_start"] == start["kl"], "the summary has another divergence at the start"


@pytest.mark.parametrize("kind", ["nll", "wd"])
def test_without_a_barrier_the_loss_is_nll(kind: str, heals: dict[str, Adapter]) -> None:
    """Reference: their kl in the loss is 0, while the measured divergences rise."""
    for row in heals[kind].curve:
        assert (row["kl"], row["barrier_on"]) == (0, 0), f"{kind} logs kl {row['kl']} at step {row['step']}"
        assert row["loss"] == row["nll"], f"{kind} adds {row['loss'] - row['nll']} to nll at step {row['step']}"
        assert row["grad_ratio"] == 0, f"{kind} logs a gradient of a barrier: {row['grad_ratio']}"
    last = heals[kind].curve[-1]
    assert min(last["kl_fwd"], last["kl_rev"]) > 1e-3, f"the measured divergences did not rise: {last}"


@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev"])
def test_a_barriers_kl_is_the_one_that_is_measured(kind: str, heals: dict[str, Adapter]) -> None:
    """Reference: two ways through the head to the same number; the barrier is reached and logged."""
    for row in heals[kind].curve:
        assert row["kl"] == pytest.approx(row[kind], rel=1e-4, abs=1e-6), f"step {row['step']}: {row}"
    last = heals[kind].curve[-1]
    other = last["kl_rev" if kind == "kl_fwd" else "kl_fwd"]
    assert last["kl"] != pytest.approx(other, rel=1e-3), "both directions are the same number"
    assert 0 < last["barrier_on"] <= 1, f"barrier_on is {last['barrier_on']} at kl {last['kl']}"
    assert last["grad_ratio"] > 0, "an active barrier has no gradient"
    shares = [row["barrier_on"] for row in heals[kind].curve]
    assert heals[kind].summary["barrier_on"] == pytest.approx(sum(shares) / len(shares))


def test_the_first_nll_is_transformers_own_loss(tiny: Base, second_round: Student) -> None:
    """Reference: transformers' loss with masked labels, a sequence at a time, averaged over sequences."""
    for student in (Student(tiny), second_round):
        model = by_hand(student)
        expected = sum(own_loss(model, row.prompt_ids, row.ids) for row in MADE.rows) / len(MADE.rows)
        start = healed(student, regulariser("nll"), batch_size=8, steps=1).curve[0]
        assert start["nll"] == pytest.approx(expected, abs=1e-5), f"nll {start['nll']}, transformers says {expected}"


@pytest.mark.parametrize("kind", ["nll", "kl_rev"])
def test_how_it_is_carried_out_changes_nothing(kind: str, second_round: Student) -> None:
    """Reference: one micro-batch and one pass of the head; then many of both, of sizes that do not divide."""
    reg = regulariser(kind, 1.0, 0.02)
    sizes = [(100, 1000, 100), (1, 1000, 1), (3, 5, 2)]
    found = [
        healed(second_round, reg, how=runtime(micro_batch=m, head_chunk=h, score_batch=s), epochs=2, lr=1e-3)
        for m, h, s in sizes
    ]
    for size, other in zip(sizes[1:], found[1:], strict=True):
        assert_alike(found[0], other, f"(micro_batch, head_chunk, score_batch) = {size}")
    again = healed(second_round, reg, how=RUNTIME.model_copy(update={"checkpoint_blocks": True}), epochs=2, lr=1e-3)
    assert_alike(found[0], again, "checkpoint_blocks")
    left = [block for block in second_round.base.blocks if "forward" in vars(block)]
    assert not left, f"{len(left)} blocks still run themselves again on the way back"


@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev"])
def test_reference_base_and_prev(kind: str, second_round: Student) -> None:
    """Reference: in round 1 the student has left base, so D starts above 0; from itself it starts at 0."""
    base, prev = (
        healed(second_round, regulariser(kind, 1.0, 0.0), reference=which, batch_size=8, steps=3)
        for which in (second_round.pristine(), second_round)
    )
    assert base.curve[0]["kl"] > 0.01, f"reference=base starts at {base.curve[0]['kl']} in round 1"
    assert abs(prev.curve[0]["kl"]) <= 1e-6, f"reference=prev starts at {prev.curve[0]['kl']}"
    assert base.curve[0]["barrier_on"] == 1, "later rounds may start above tau"
    assert prev.curve[2]["kl"] > 1e-5, "reference=prev does not see this round's drift"


def test_the_checkpoint_is_pefts(tiny: Base, second_round: Student, tmp_path: Path) -> None:
    """Reference: PeftModel.from_pretrained on a fresh copy, its logits against those of the student's view."""
    for k, student in enumerate((Student(tiny), second_round)):
        found = healed(student, regulariser("nll"), epochs=2, size=lora(3, alpha=4.5))
        folder = tmp_path / f"{k}"
        folder.mkdir()
        found.save(folder)
        loaded = peft.PeftModel.from_pretrained(by_hand(student), folder).eval()
        theirs = logits_of(loaded, *IDS)
        with student.learn(found).view() as model:
            ours = logits_of(model, *IDS)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        with student.view() as model:
            assert (logits_of(model, *IDS) - ours).abs().max() > 0.01, "healing changed nothing"
        assert off(found) < 1e-5, f"adapter and view differ by {off(found)} of the states"
        again = Adapter.load(folder)
        assert all(torch.equal(found.factors[n], f) for n, f in again.factors.items()), "factors changed on disk"


@pytest.mark.parametrize("lam", [0.0, 1.0, 2.5])
def test_weight_decay_shrinks_by_exp_minus_lam(tiny: Base, lam: float) -> None:
    """Reference: at a rate at which nothing else moves, A ends at exp(-lam) of where PEFT began it."""
    with live_adapter(lora(), tiny.model, 3) as wrapped:
        begun = factors(wrapped)
    found = healed(Student(tiny), regulariser("wd", lam), seed=3, epochs=3, lr=STILL)
    assert found.summary["shrink"] == pytest.approx(1 - math.exp(-lam)), "the total shrink is misreported"
    for name, factor in found.factors.items():
        torch.testing.assert_close(factor, begun[name] * math.exp(-lam), atol=1e-6, rtol=1e-5, msg=f"{name}: lam {lam}")


def test_only_weight_decay_shrinks(heals: dict[str, Adapter]) -> None:
    """Reference: 1 - exp(-1) for lam = 1, whatever the number of steps; 0 for the others."""
    shrinks = {kind: found.summary["shrink"] for kind, found in heals.items()}
    assert shrinks == {"nll": 0, "kl_fwd": 0, "kl_rev": 0, "wd": pytest.approx(1 - math.exp(-1))}
    sizes = {kind: sum(float(f.norm()) for f in heals[kind].factors.values()) for kind in ("nll", "wd")}
    assert sizes["wd"] < 0.8 * sizes["nll"], f"weight decay leaves the adapter as large: {sizes}"


@pytest.mark.parametrize(("steps", "expected"), [(None, 6), (1, 1), (5, 5), (11, 11)])
def test_steps_override_epochs(tiny: Base, steps: int | None, expected: int) -> None:
    """Reference: two epochs of eight sequences by three are six steps; a number of steps goes before."""
    logged: list[Row] = []
    found = healed(Student(tiny), regulariser("nll"), epochs=2, batch_size=3, steps=steps, lr=STILL, log=logged.append)
    assert [row["step"] for row in found.curve] == list(range(expected)), f"{len(found.curve)} steps"
    assert logged == list(found.curve), "the log was told something else than the curve says"
    assert found.summary["steps"] == expected
    last = [row["nll"] for row in found.curve[-5:]]
    assert found.summary["heal_nll"] == pytest.approx(sum(last) / len(last)), "heal_nll is not the last five's mean"


def test_every_epoch_sees_every_sequence_once(tiny: Base) -> None:
    """Reference: each sequence's own nll, while nothing is learned, one sequence a step; epochs in another order."""
    nll = [row["nll"] for row in healed(Student(tiny), regulariser("nll"), epochs=3, batch_size=1, lr=STILL).curve]
    expected = sorted(own_loss(tiny.model, row.prompt_ids, row.ids) for row in MADE.rows)
    epochs = [nll[:8], nll[8:16], nll[16:]]
    for k, epoch in enumerate(epochs):
        assert sorted(epoch) == pytest.approx(expected, abs=1e-5), f"epoch {k} does not see each sequence once"
    assert epochs[0] != epochs[1] != epochs[2], "every epoch has the same order"


def test_the_learning_rate(tiny: Base) -> None:
    """Reference: a linear warm-up over a fifth of ten steps, then half a cosine, written out."""
    found = healed(Student(tiny), regulariser("nll"), steps=10, warmup=0.2, lr=3e-3)
    expected = [1e-3, 2e-3, *(3e-3 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]
    assert [row["lr"] for row in found.curve] == pytest.approx(expected)


def test_it_learns(heals: dict[str, Adapter], tiny: Base) -> None:
    """Reference: nll falls on what is trained on; a barrier allows less drift than none."""
    curve = heals["nll"].curve
    first, last = (sum(row["nll"] for row in part) for part in (curve[:2], curve[-2:]))
    assert last < 0.9 * first, f"nll fell from {first / 2} to {last / 2} only"
    free = heals["nll"].curve[-1]["kl_rev"]
    held = healed(Student(tiny), regulariser("kl_rev", 50.0, 0.005), epochs=4).curve[-1]["kl_rev"]
    assert held < 0.7 * free, f"a strong barrier ends at kl_rev {held}, none at {free}"


def test_measurements_come_every_few_steps(tiny: Base) -> None:
    """Reference: steps 0, 3, 6 and the last one, for a regulariser without a barrier too."""
    found = healed(Student(tiny), regulariser("nll"), steps=9, measure_every=3, lr=STILL)
    for name in ("kl_fwd", "kl_rev", "grad_ratio"):
        seen = [row["step"] for row in found.curve if name in row]
        assert seen == [0, 3, 6, 8], f"{name} is measured at steps {seen}"


def test_validation(tiny: Base) -> None:
    """Reference: transformers' own loss on held-out rows that failed no filter, before, and with the adapter."""
    held = rows(5, seed=9)
    made_bad = dataclasses.replace(held.rows[2], reasons=("length",), ids=(7,) * 30)
    held = Completions(rows=(*held.rows[:2], made_bad, *held.rows[3:]))
    student = Student(tiny)
    found = healed(student, regulariser("nll"), held=held, epochs=3)
    seen = {row["step"]: row["val_nll"] for row in found.curve if "val_nll" in row}
    assert sorted(seen) == [0, 1, 3, 5], f"validated at steps {sorted(seen)}; epochs end at 1, 3 and 5"
    for step, who in ((0, student), (5, student.learn(found))):
        model = by_hand(who)
        expected = sum(own_loss(model, row.prompt_ids, row.ids) for row in held.passed()) / 4
        assert seen[step] == pytest.approx(expected, abs=1e-4), f"val_nll {seen[step]} at step {step}, not {expected}"
    none = healed(student, regulariser("nll"), held=Completions(rows=()), steps=2)
    assert not any("val_nll" in row for row in none.curve), "a figure without anything to validate on"


@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev"])
def test_loss_is_nll_plus_the_hinge_of_each_sequence(kind: str, second_round: Student) -> None:
    """Reference: nll + lam * max(0, kl - tau) with one sequence a step."""
    lam, tau = 0.7, 0.3
    found = healed(second_round, regulariser(kind, lam, tau), batch_size=1, epochs=2)
    for row in found.curve:
        expected = row["nll"] + lam * max(0.0, row["kl"] - tau)
        assert row["loss"] == pytest.approx(expected, abs=1e-6), f"step {row['step']}: {row}"
        assert row["barrier_on"] == (row["kl"] > tau), f"step {row['step']}: barrier_on {row['barrier_on']}"
    assert {row["barrier_on"] for row in found.curve} == {0, 1}, "this test needs steps on both sides of tau"


def test_the_hinge_is_per_sequence_and_not_of_their_mean(second_round: Student) -> None:
    """Reference: the mean of hinges, from a heal of one sequence a step in which nothing moves."""
    reg = regulariser("kl_rev", 1.0, 0.3)
    each = healed(second_round, reg, batch_size=1, lr=STILL).curve
    whole = healed(second_round, reg, batch_size=8, steps=1).curve[0]
    mean_of_hinges = sum(max(0.0, row["kl"] - 0.3) for row in each) / 8
    hinge_of_mean = max(0.0, sum(row["kl"] for row in each) / 8 - 0.3)
    assert abs(mean_of_hinges - hinge_of_mean) > 1e-3, "this test cannot tell the two apart"
    assert whole["loss"] - whole["nll"] == pytest.approx(mean_of_hinges, abs=1e-5)


def test_seeds(tiny: Base, heals: dict[str, Adapter]) -> None:
    """Reference: one seed gives one result to the bit, whatever ran before; another gives another start and order."""
    torch.manual_seed(123)
    again = healed(Student(tiny), regulariser("kl_rev", 1.0, 0.005), epochs=4)
    assert again.curve == heals["kl_rev"].curve, "the same seed gave another curve"
    differ = [name for name, factor in again.factors.items() if not torch.equal(factor, heals["kl_rev"].factors[name])]
    assert not differ, f"the same seed gave other factors: {differ[:3]}"
    other = healed(Student(tiny), regulariser("kl_rev", 1.0, 0.005), epochs=4, seed=1)
    assert other.curve[0]["nll"] != again.curve[0]["nll"], "another seed has the same first batch"
    name = next(n for n in again.factors if "lora_A" in n)
    assert not torch.allclose(other.factors[name], again.factors[name], atol=1e-2), "another seed, the same start"
