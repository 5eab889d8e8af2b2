"""Drift: every position's divergence as a plain pass has it, the worst places in context, and what is said of it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import RUNTIME, adapter, by_hand, healed, logits_of, preset, regulariser, rows
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from steer_heal.artifacts import Adapter, Completion, Completions, Row
from steer_heal.eval import EvalInput, evaluate
from steer_heal.eval.drift import DriftSpread
from steer_heal.heal.drift import CONTEXT, NAMES, WORST, Drift, Place, drift
from steer_heal.heal.reference import Targets, reference_states
from steer_heal.lm.base import Base
from steer_heal.lm.batch import Pair
from steer_heal.lm.divergence import Aggregator
from steer_heal.lm.student import Student, Subject
from steer_heal.reg import Regulariser
from steer_heal.report.diagnostics import diagnose, worst_positions

TARGETS = Targets.of(rows(13, seed=4, completion=20).kept(), 25)  # some are cut, and there are more than are shown


def strayed(student: Student, reference: Student, kind: str, targets: Targets = TARGETS) -> Drift:
    anchor = reference_states(reference, targets, runtime=RUNTIME)
    return drift(student, lambda: anchor, targets, regulariser(kind), runtime=RUNTIME)


def expected(student: Student, reference: Student, targets: Targets = TARGETS) -> list[Tensor]:
    """KL(reference || student) and KL(student || reference) [2, c] of every text, from plain passes without padding."""
    models, found = [by_hand(student), by_hand(reference)], []
    for pair in targets.pairs:
        here = slice(len(pair.prompt) - 1, len(pair) - 1)
        q, p = (Categorical(logits=logits_of(model, *pair.prompt, *pair.completion)[here]) for model in models)
        found.append(torch.stack([kl_divergence(p, q), kl_divergence(q, p)]))
    return found


@pytest.fixture(scope="module")
def third_round(second_round: Student) -> Student:
    return second_round.learn(adapter(second_round.base, 2, size=0.15))


@pytest.mark.parametrize("kind", ["nll", "wd", "kl_fwd", "kl_rev"])
@pytest.mark.parametrize("against", ["base", "prev"])
def test_every_position_is_that_of_full_logits(
    second_round: Student, third_round: Student, kind: str, against: str
) -> None:
    """Reference: torch.distributions on logits of transformers' own forward, a text at a time."""
    reference = second_round if against == "prev" else second_round.pristine()
    found, both = strayed(third_round, reference, kind), expected(third_round, reference)
    assert found.lengths == tuple(len(pair.completion) for pair in TARGETS.pairs), "texts of other lengths"
    own = {"kl_fwd": 0, "kl_rev": 1}.get(kind)
    zeros = torch.zeros(sum(found.lengths))
    for i, name in enumerate(NAMES):
        row = torch.cat([values[i if i < 2 else own] for values in both]) if i < 2 or own is not None else zeros
        torch.testing.assert_close(
            found.of(name), row, rtol=1e-3, atol=1e-5, msg=functools.partial("{}, {}: {}".format, kind, name)
        )
    assert (found.of("kl_fwd") - found.of("kl_rev")).abs().max() > 0.01, "this test cannot tell the directions apart"


def test_who_has_learned_nothing_has_not_strayed(second_round: Student) -> None:
    """Reference: 0 up to rounding, of a student from itself."""
    values = strayed(second_round, second_round, "kl_rev").values
    assert values.abs().max() <= 1e-5, f"it strayed {values.abs().max()} from itself"


@pytest.mark.parametrize("how", ["mean", "rmse", "p95", "max"])
def test_a_texts_number_is_that_of_its_positions(second_round: Student, how: Aggregator) -> None:
    """Reference: numpy, a text at a time."""
    found = strayed(second_round, second_round.pristine(), "kl_fwd")
    own: dict[str, Any] = {
        "mean": np.mean,
        "rmse": lambda x: np.sqrt(np.mean(x**2)),
        "p95": lambda x: np.percentile(x, 95),
        "max": np.max,
    }
    for name in NAMES:
        texts = np.split(found.of(name).double().numpy(), np.cumsum(found.lengths)[:-1])
        assert found.per_text(name, how).tolist() == pytest.approx([own[how](x) for x in texts], rel=1e-5), (
            f"{how} of {name} is not that of each text's positions"
        )


def test_the_evaluation_is_of_all_positions(second_round: Student) -> None:
    """Reference: numpy's mean and percentiles over all texts together, and the mean of each text by its id."""
    found = dataclasses.replace(strayed(second_round, second_round.pristine(), "nll"), key="made-up")
    subject = Subject(second_round)
    given = EvalInput("healed", preset().trait, subject, Completions(()), None, found, None)  # type: ignore[arg-type]
    option = DriftSpread(name="drift")
    said = evaluate(option, subject, option.material(given), runtime=RUNTIME)
    left = dict(said.values)
    for name in ("kl_fwd", "kl_rev"):
        every = found.of(name).double().numpy()
        at = [every.mean(), *np.percentile(every, [50, 95, 100])]
        assert [left.pop(f"{name}_{what}") for what in ("mean", "p50", "p95", "max")] == pytest.approx(at, rel=1e-5)
        texts = np.split(every, np.cumsum(found.lengths)[:-1])
        own = [said.items[i][f"{name}_mean"] for i in found.ids]
        assert own == pytest.approx([part.mean() for part in texts], rel=1e-5), f"{name} of the texts"
    assert not left, f"{left} is unknown to this test"
    assert len(set(found.ids)) == len(TARGETS.pairs)


@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev", "nll"])
def test_the_worst_are_the_worst(second_round: Student, kind: str) -> None:
    """Reference: the largest of each text, from full logits, largest first; what is decoded are its last ids."""
    base = second_round.pristine()
    by = 0 if kind == "kl_fwd" else 1
    both, decode = expected(second_round, base), second_round.base.tokenizer.decode
    order = sorted(range(len(both)), key=lambda i: -float(both[i][by].max()))
    other = sorted(range(len(both)), key=lambda i: -float(both[i][1 - by].max()))
    assert order[:WORST] != other[:WORST], "this test cannot tell by which divergence they are the worst"
    found = strayed(second_round, base, kind).worst
    assert len(found) == WORST, f"{len(found)} places of {len(both)} texts"
    for rank, (i, place) in enumerate(zip(order[:WORST], found, strict=True)):
        pair, at = TARGETS.pairs[i], int(both[i][by].argmax())
        figures = (place.kl_fwd, place.kl_rev)
        assert figures == pytest.approx(both[i][:, at].tolist(), rel=1e-3, abs=1e-5), f"rank {rank} is another place"
        ids = [*pair.prompt, *pair.completion]
        end = len(pair.prompt) + at
        assert place.before == decode(ids[max(0, end - CONTEXT) : end]), f"rank {rank}: another context"
        assert place.token == decode([ids[end]]), f"rank {rank}: another token"


def test_few_texts_are_all_shown(second_round: Student) -> None:
    """Reference: one place a text."""
    few = Targets(TARGETS.pairs[:3])
    assert len(strayed(second_round, second_round.pristine(), "kl_rev", few).worst) == 3


def test_what_is_read_back_is_what_was_saved(second_round: Student, tmp_path: Path) -> None:
    """Reference: what was saved; text beyond ASCII, quotes and control characters included."""
    odd = Place(0.5, 0.25, 'a "b"\n\x1b[31m\u202e', "日\x00")
    found = strayed(second_round, second_round.pristine(), "kl_rev")
    found = dataclasses.replace(found, worst=(*found.worst, odd))
    found.save(tmp_path)
    again = Drift.load(tmp_path)
    assert torch.equal(again.values, found.values), "values changed on disk"
    assert (again.lengths, again.worst) == (found.lengths, found.worst), "lengths or places changed on disk"


def test_control_characters_that_a_model_emits_are_escaped(tiny: Base, second_round: Student) -> None:
    """Reference: ids whose bytes clear a terminal or ring its bell; all that is said can be printed in one line."""
    vocab = tiny.tokenizer.get_vocab()
    codes = {byte: vocab[chr(0x100 + byte)] for byte in (0x1B, 0x07, 0x0A, 0x0D)}  # as byte-level BPE spells them
    assert tiny.tokenizer.decode([codes[0x1B]]) == "\x1b", "this test has the wrong ids"
    pairs = tuple(Pair((20, 21, codes[0x1B], codes[0x0D]), (codes[byte],)) for byte in codes)
    found = strayed(second_round, second_round.pristine(), "kl_rev", Targets(pairs))
    said = worst_positions(found)
    assert len(said) == 4, f"a line on all positions and three places, not {said}"
    odd = [line for line in said if not line.isprintable()]
    assert not odd, f"{odd} would reach the terminal"
    assert all(r"\x1b\r' -> " in line for line in said[1:]), f"what leads there is not shown: {said[1:]}"


def test_places_says_where_it_strayed_farthest(second_round: Student) -> None:
    """Reference: the figures of the summary, and the three worst in their order."""
    found = strayed(second_round, second_round.pristine(), "kl_rev")
    first, *lines = worst_positions(found)
    for value in np.percentile(found.of("kl_rev").double().numpy(), [50, 95, 100]):
        assert f" {value:.3f}" in first, f"{value:.3f} is not in {first!r}"
    for line, place in zip(lines, found.worst[:3], strict=True):
        assert line.split()[:2] == [f"{place.kl_rev:.2f}", f"{place.kl_fwd:.2f}"], f"{line!r} is not {place}"
        assert line.endswith(f"{place.before!r} -> {place.token!r}"), f"{line!r} is not {place}"


def said_of(found: Adapter, reg: Regulariser) -> str:
    """The one sentence on the barrier."""
    (sentence,) = [line for line in diagnose(found, reg) if "barrier" in line]
    return sentence


def test_a_barrier_that_never_fires_balances_or_outweighs(second_round: Student) -> None:
    """Reference: three heals, with tau out of reach, between the divergences met on the way, and at 0."""
    out_of_reach, at_0 = (regulariser("kl_rev", 1.0, tau) for tau in (1e6, 0.0))
    never, always = (healed(second_round, reg, epochs=2) for reg in (out_of_reach, at_0))
    kl = [row["kl"] for row in always.curve]
    within = regulariser("kl_rev", 1.0, sum(kl) / len(kl))
    between = healed(second_round, within, epochs=2)
    assert 0 < between.summary["barrier_on"] < 0.9, f"this test needs a barrier that is on and off: {between.summary}"
    assert said_of(never, out_of_reach) == (
        f"warning: the barrier never passed tau (kl at most {max(r['kl'] for r in never.curve):.3f}): this *is* nll"
    )
    said = said_of(between, within)
    assert said.startswith("ok: balanced: barrier on for "), said
    said = said_of(always, at_0)
    assert said.startswith("warning: always on, it outweighs nll: barrier on for 100% of"), said
    said = said_of(always, regulariser("kl_rev", 0.0, 0.0))
    assert said == "warning: the barrier costs nothing with lam=0: this *is* nll"


@pytest.mark.parametrize(
    ("on", "tau", "begins", "ends"),
    [
        (0.01, 0.2, "ok: balanced", ""),
        (0.89, 0.15, "ok: balanced", ""),
        (0.9, 0.2, "warning: always on, it outweighs nll", ""),
        (0.9, 0.149, "warning: nll outweighs the penalty, a higher lam would bind more", ", 2.0 times tau"),
        (0.5, 0.01, "warning: nll outweighs the penalty, a higher lam would bind more", ", 30.0 times tau"),
    ],
)
def test_always_on_and_not_held(on: float, tau: float, begins: str, ends: str) -> None:
    """Reference: nine in ten, and twice tau at the end, from both sides."""
    curve = tuple(Row(step=float(k), nll=2.0 - k, kl=0.3, gnorm=1.0) for k in range(2))
    summary: Row = {
        "barrier": 1.0,
        "decays": 0.0,
        "barrier_on": on,
        "shrink": 0.0,
        "n_too_long": 0.0,
        "fold_projection": 1.0,
    }
    sentence = said_of(Adapter({}, {}, curve, summary), regulariser("kl_rev", 1.0, tau))
    figures = f"barrier on for {on:.0%} of the sequences, kl at most 0.300 and 0.300 at the end"
    assert sentence == f"{begins}: {figures}{ends}"


def test_a_position_is_that_which_predicts(second_round: Student) -> None:
    """Reference: a token is the last of a text, so no position's divergence may depend on it."""

    def one(last: int) -> Tensor:
        row = Completion("p", (5, 6, 7), (8, 9, last), "t", 0.5, True, kept=True)
        return strayed(second_round, second_round.pristine(), "kl_rev", Targets.of([row], 99)).values

    assert torch.equal(one(30), one(31)), "a position looks at the token that it predicts"
