"""A heal that goes wrong stops, says what to change, and keeps its last good adapter."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from helpers.compose import composed
from helpers.toys import by_hand, healed, logits_of, lora, regulariser, runtime
from torch import Tensor

from steer_heal import loop, stages
from steer_heal.artifacts import Adapter, Row
from steer_heal.heal import HealError, heal
from steer_heal.heal.training import _wrong
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.lora import factors, live_adapter
from steer_heal.reg.kl_rev import KlRev
from steer_heal.store import Store
from steer_heal.store.checkpoint import Checkpoint
from steer_heal.tracker.jsonl import JsonlConfig

Factors = dict[str, Tensor]
WAY_OUT = {
    math.nan: r"lower heal\.lr \(now 0\.01\)",
    1e9: r"lower heal\.lr \(now 0\.01\) or lam, or raise heal\.max_gnorm \(now 1000\)",
}


def live_factors(base: Base) -> Factors:
    """The factors in training, by the names that an adapter has them under."""
    found = {name: p for name, p in base.model.named_parameters() if ".lora_" in name}
    return {name.replace(".default.", "."): p.detach().clone() for name, p in found.items()}


class Watched:
    """A log that keeps the factors after every step; a penalty that explodes after a number of rows."""

    def __init__(self, base: Base, monkeypatch: pytest.MonkeyPatch, at: int, times: float) -> None:
        self.base, self.rows, self.after = base, list[Row](), list[Factors]()
        plain = KlRev.penalty
        monkeypatch.setattr(KlRev, "penalty", lambda reg, d: plain(reg, d) * (times if len(self.rows) == at else 1.0))

    def __call__(self, row: Row) -> None:
        self.rows.append(row)
        self.after.append(live_factors(self.base))


def failed(student: Student, checkpoint: Checkpoint, log: Callable[[Row], None], **config: Any) -> str:
    with pytest.raises(HealError) as error:
        healed(student, regulariser("kl_rev", 1.0, 0.0), checkpoint=checkpoint, log=log, batch_size=4, **config)
    return str(error.value)


def kept_in(message: str, checkpoint: Checkpoint) -> Path:
    """The folder that a message names, which is beside the result's own."""
    found = re.search(r"\. The last good adapter is in (\S+)$", message)
    assert found, f"no folder is named: {message}"
    assert Path(found[1]) == checkpoint.path.with_suffix(".failed"), f"it is kept in {found[1]}"
    return Path(found[1])


def assert_kept(folder: Path, expected: Factors) -> None:
    kept = Adapter.load(folder)
    assert kept.factors.keys() == expected.keys(), f"other factors: {kept.factors.keys() ^ expected.keys()}"
    for name, factor in expected.items():
        assert kept.factors[name].isfinite().all(), f"{name} is not finite"
        assert torch.equal(kept.factors[name], factor), f"{name} is not as it was before the last good step"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / ".key.partial")


@pytest.mark.parametrize("times", [math.nan, 1e9])
def test_what_explodes_stops_with_all_there_is_to_say(
    second_round: Student, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    """Reference: the factors before the step before the one that fails, seen from the log; PEFT loads what is kept."""
    watched = Watched(second_round.base, monkeypatch, at=6, times=times)
    message = failed(second_round, checkpoint, watched, epochs=4)
    assert re.match(rf"step 6: loss \S+, gnorm \S+ on completions \[\d(, \d){{3}}\].*; {WAY_OUT[times]}\. ", message), (
        message
    )
    usual = sorted(row["gnorm"] for row in watched.rows)[2:4]
    if times == 1e9:
        told = re.search(r"gnorm is (\S+) times its median so far, (\S+);", message)
        assert told, message
        assert float(told[2]) == pytest.approx(sum(usual) / 2, rel=5e-3), f"not the median of {usual}: {message}"
        assert float(told[1]) > 1000, message
    folder = kept_in(message, checkpoint)
    assert_kept(folder, watched.after[4])
    assert [row["step"] for row in Adapter.load(folder).curve] == [0, 1, 2, 3, 4, 5], "its curve is not that so far"
    with second_round.learn(Adapter.load(folder)).view() as model:
        ours = logits_of(model, *range(20, 50))
    theirs = logits_of(peft.PeftModel.from_pretrained(by_hand(second_round), folder).eval(), *range(20, 50))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=lambda m: f"PEFT loads something else: {m}")


def test_a_huge_rate_leaves_what_it_began_with(tiny: Base, checkpoint: Checkpoint) -> None:
    """Reference: a fresh adapter, for the only good step was the one that broke it."""
    with live_adapter(lora(), tiny.model, 0) as wrapped:
        fresh = factors(wrapped)
    message = failed(Student(tiny), checkpoint, lambda _: None, lr=1e30, warmup=0.0)
    assert re.match(r"step 1: loss .*(nan|inf).*lower heal\.lr \(now 1e\+30\)", message), message
    assert_kept(kept_in(message, checkpoint), fresh)


def test_a_second_attempt_keeps_no_worse(
    second_round: Student, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the first attempt's. The rerun resumes at the failing step, from factors not known to be good."""
    first = Watched(second_round.base, monkeypatch, at=6, times=math.nan)
    said = failed(second_round, checkpoint, first, epochs=4, how=runtime(checkpoint_seconds=0))
    assert checkpoint.path.exists(), "there is nothing to go on from"
    monkeypatch.undo()
    again = Watched(second_round.base, monkeypatch, at=6, times=math.nan)
    assert failed(second_round, checkpoint, again, epochs=4) == said
    assert again.rows == first.rows, "the second attempt has other rows"
    assert_kept(kept_in(said, checkpoint), first.after[4])


def test_the_first_step_leaves_nothing(
    second_round: Student, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: an empty folder; no adapter was ever known to be good."""
    message = failed(second_round, checkpoint, Watched(second_round.base, monkeypatch, at=0, times=math.nan))
    assert message.startswith("step 0: loss nan"), message
    assert "last good adapter" not in message, message
    assert not list(checkpoint.path.parent.iterdir()), f"{list(checkpoint.path.parent.iterdir())} was kept"


def test_no_median_is_asked_of_too_few_steps(
    second_round: Student, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: an explosion in the fifth step passes, one in the sixth does not; a higher limit lets it pass."""
    for at, limit, stops in ((4, 1000, False), (5, 1000, True), (5, 1e12, False)):
        with monkeypatch.context() as patch:
            watched = Watched(second_round.base, patch, at=at, times=1e9)
            given = {"log": watched, "epochs": 4, "max_gnorm": limit, "batch_size": 4}
            if stops:
                assert f"step {at}:" in failed(second_round, checkpoint, epochs=4, max_gnorm=limit, log=watched)
            else:
                healed(second_round, regulariser("kl_rev", 1.0, 0.0), **given)  # type: ignore[arg-type]
                assert watched.rows[at]["gnorm"] > 1e6, f"nothing exploded in step {at}"


def test_what_breaks_at_the_end_of_an_epoch_is_seen_in_validation(
    tiny: Base, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the factors before the step that broke them, a step of rate 1e30 that ends the second epoch."""
    from steer_heal.heal.distil import Heal

    monkeypatch.setattr(Heal, "rate", lambda self, step, total: 1e30 if step == 3 else 1e-3)
    watched = Watched(tiny, monkeypatch, at=-1, times=1.0)
    message = failed(Student(tiny), checkpoint, watched, epochs=3)
    assert re.match(r"step 3: val_nll is (nan|inf) after it; lower heal\.lr", message), message
    assert_kept(kept_in(message, checkpoint), watched.after[2])


def test_a_last_step_that_breaks_it_is_no_result(tiny: Base, checkpoint: Checkpoint) -> None:
    """Reference: one step at a rate of 1e30, without anything to validate on."""
    from steer_heal.artifacts import Completions

    message = failed(Student(tiny), checkpoint, lambda _: None, lr=1e30, warmup=0.0, steps=1, held=Completions(rows=()))
    assert re.match(r"the last step left .* not finite, or all 0; lower heal\.lr \(now 1e\+30\)", message), message


def test_a_second_round_that_fails_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same run of one round; why the second one ended names the adapter that it has kept."""
    heals, calls, plain = list[int](), list[int](), KlRev.penalty

    @functools.wraps(heal)
    def counted(*what: Any, **how: Any) -> Adapter:
        heals.append(0)
        calls.clear()
        return heal(*what, **how)

    def penalty(reg: KlRev, d: Tensor) -> Tensor:
        calls.append(0)
        return plain(reg, d) * (math.nan if len(heals) == 2 and len(calls) > 2 * 4 else 1.0)

    def looped(n: int) -> loop.Result:
        exp = composed("experiment=tiny", "reg=kl_rev", f"n_rounds={n}", "heal.epochs=6", "runtime.micro_batch=8")
        with JsonlConfig(name="jsonl").open(tmp_path, config={}, group=None, run_name="loop") as tracker:
            return loop.run(exp, Store(tmp_path / "store"), tracker)

    monkeypatch.setattr(stages, "heal", counted)
    monkeypatch.setattr(KlRev, "penalty", penalty)
    two = looped(2)
    assert len(heals) == 2, f"{len(heals)} heals"
    assert re.match(r"round 1: step \d+: loss nan.*lower heal\.lr", two.stopped), two.stopped
    folder = Path(two.stopped.rpartition(" is in ")[2])
    assert folder.parent == tmp_path / "store/heal.heal", f"kept in {folder}"
    assert Adapter.load(folder).curve, "what is kept has learned nothing"
    one = looped(1)
    assert (two.rows, [r.adapter.key for r in two.rounds]) == (one.rows, [r.adapter.key for r in one.rounds])


def test_an_adapter_that_silences_the_model_is_no_result(tiny: Base, checkpoint: Checkpoint) -> None:
    """Reference: states of 0, which its norms make of what is too large to be squared."""
    message = failed(Student(tiny), checkpoint, lambda _: None, lr=1e12, warmup=0.0, steps=1)
    assert re.match(r".*states.* all 0; lower heal\.lr \(now 1e\+12\)", message), message


@pytest.mark.parametrize(("gnorm", "stops"), [(0.9, False), (1.1, True)])
def test_a_gradient_too_small_to_clip_is_no_explosion(tiny: Base, gnorm: float, stops: bool) -> None:
    """Reference: the norm at which gradients are clipped, from both sides; each is 100 times the median before it."""
    curve = [Row(step=float(k), gnorm=gnorm / 100) for k in range(5)]
    config = composed().heal.model_copy(update={"max_gnorm": 10.0})
    training: Any = SimpleNamespace(config=config)
    said = _wrong(Row(step=5.0, loss=1.0, gnorm=gnorm), curve, [0], training)
    assert ("gnorm is 100.0 times its median so far" in said) == stops, f"{said!r}"


def test_an_overflowing_penalty_blames_lam(tiny: Base, checkpoint: Checkpoint) -> None:
    """The learning rate is a good one, so that lowering it would not help."""
    with pytest.raises(
        HealError,
        match=r"the penalty of lam=1e\+30 dwarfs the nll of \S+: lower lam(\. The last good adapter is in \S+)?$",
    ):
        healed(Student(tiny), regulariser("kl_rev", 1e30, 0.0), checkpoint=checkpoint, log=lambda _: None, steps=4)
