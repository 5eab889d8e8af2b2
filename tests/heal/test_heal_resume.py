"""A heal that is stopped resumes where it was, and gives the same result to the bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command
from helpers.compose import composed
from helpers.toys import adapter, healed, preset, regulariser, rows, runtime

from steer_heal.artifacts import Adapter, Row
from steer_heal.heal.training import Progress, _restore, _saved
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.loop import run
from steer_heal.model import load
from steer_heal.store import Store
from steer_heal.store.checkpoint import Checkpoint
from steer_heal.store.entries import leftovers
from steer_heal.tracker.jsonl import JsonlConfig

EVERY_STEP = runtime(checkpoint_seconds=0)
STEPS = 6  # two epochs of eight by three: a step ends an epoch in the middle
DAY = 86400.0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def student(request: pytest.FixtureRequest) -> Student:
    """A student that has left its base, so that every barrier is on."""
    base = load(preset(f"model.dtype={request.param}").model)
    return Student(base).learn(adapter(base, 1, size=0.15))


def trained(
    student: Student, kind: str, log: Callable[[Row], None] = lambda _: None, checkpoint: Checkpoint | None = None
) -> Adapter:
    reg = regulariser(kind, 1.0, 0.05)
    return healed(student, reg, made=rows(8), epochs=2, batch_size=3, log=log, checkpoint=checkpoint, how=EVERY_STEP)


class Stopped(Exception):
    """A simulated power failure."""


def stop_after(student: Student, kind: str, k: int, path: Path) -> None:
    """A heal that goes no further than step k, whose checkpoint is not written any more."""

    def log(row: Row) -> None:
        if row["step"] == k:
            raise Stopped

    with pytest.raises(Stopped):
        trained(student, kind, log, Checkpoint(path))


def assert_same(found: Adapter, expected: Adapter, what: str) -> None:
    """Assert equality to the bit, except for durations."""
    for a, b in zip(found.curve, expected.curve, strict=True):
        assert a == b, f"{what}: step {b['step']:.0f} has {a}, undisturbed it has {b}"
    differ = [name for name, factor in expected.factors.items() if not torch.equal(factor, found.factors[name])]
    assert not differ, f"{what}: {len(differ)} factors differ, {differ[:2]} among them"
    figures = [{name: value for name, value in one.summary.items() if name != "seconds"} for one in (found, expected)]
    assert figures[0] == figures[1], f"{what}: the summary is another"


@pytest.mark.parametrize("kind", ["nll", "kl_rev", "wd"])
def test_a_stopped_heal_goes_on_to_the_same_bits(student: Student, kind: str, tmp_path: Path, told: list[str]) -> None:
    """Reference: a heal that is not stopped. A stop in the first step leaves nothing to resume from."""
    whole: list[Row] = []
    expected = trained(student, kind, whole.append)
    assert len(whole) == STEPS, f"this test takes {STEPS} steps for granted, not {len(whole)}"
    for k in (0, 3, STEPS - 2):
        path = tmp_path / f"{k}.partial"
        stop_after(student, kind, k, path)
        assert path.exists() == (k > 0), f"stopped in step {k}: a checkpoint is {'' if path.exists() else 'not '}there"
        told.clear()
        logged: list[Row] = []
        found = trained(student, kind, logged.append, Checkpoint(path))
        where = [line for line in told if line.startswith("resuming at step")]
        assert where == ([f"resuming at step {k} of {STEPS}"] if k else []), f"stopped in step {k}: it said {where}"
        assert_same(found, expected, f"{kind}, stopped in step {k}")
        assert logged == whole, f"stopped in step {k}: the log was told steps {[row['step'] for row in logged]}"


def test_twice_stopped_is_no_different(tiny: Base, tmp_path: Path) -> None:
    """Reference: a heal that is not stopped; this one resumes from the same file over and over."""
    expected = trained(Student(tiny), "kl_rev")
    for k in (2, 3, 4):
        stop_after(Student(tiny), "kl_rev", k, tmp_path / "partial")
    assert_same(
        trained(Student(tiny), "kl_rev", checkpoint=Checkpoint(tmp_path / "partial")), expected, "stopped three times"
    )


def test_seconds_are_those_of_all_attempts(tiny: Base, tmp_path: Path) -> None:
    """Reference: a first attempt that sleeps for a second, and the clock on the wall."""
    begun = time.monotonic()

    def log(row: Row) -> None:
        if row["step"] == 0:
            time.sleep(1)
        if row["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        trained(Student(tiny), "nll", log, Checkpoint(tmp_path / "partial"))
    found = trained(Student(tiny), "nll", checkpoint=Checkpoint(tmp_path / "partial")).summary["seconds"]
    assert 1 <= found <= time.monotonic() - begun, f"{found} s, of which the first attempt slept for one"


def test_what_adamw_counted_goes_back_to_its_device() -> None:
    """A fused AdamW counts steps beside the parameters; the meta device stands in for an accelerator."""

    def stepped(device: str) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
        parameters = [torch.nn.Parameter(torch.ones(2, 3, device=device))]
        optimiser = torch.optim.AdamW(parameters, fused=device == "cpu")
        if device == "cpu":
            parameters[0].grad = torch.ones(2, 3)
            optimiser.step()
        return parameters, optimiser

    parameters, optimiser = stepped("cpu")
    saved = _saved(Progress(), parameters, [torch.ones(2, 3)], optimiser)
    others, fresh = stepped("meta")
    _restore(saved, Progress(), others, [torch.ones(2, 3, device="meta")], fresh)
    found = {name: value.device.type for name, value in fresh.state[others[0]].items()}
    assert found == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "meta"), found


def test_a_checkpoint_is_written_only_so_often(tiny: Base, tmp_path: Path) -> None:
    """Reference: a heal much shorter than the 300 s of the preset writes none."""
    healed(Student(tiny), regulariser("nll"), checkpoint=Checkpoint(tmp_path / "partial"))
    assert not list(tmp_path.iterdir()), f"{list(tmp_path.iterdir())} was written"


def test_a_checkpoint_is_as_readable_as_any_file(tmp_path: Path) -> None:
    """A store is shared: users who can read its results can resume from another user's killed job."""
    checkpoint, plain = Checkpoint(tmp_path / "partial"), tmp_path / "plain"
    checkpoint.save(b"so far")
    plain.touch()
    assert oct(checkpoint.path.stat().st_mode) == oct(plain.stat().st_mode)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier checkpoint stays, without a partial new one beside it."""

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    checkpoint = Checkpoint(tmp_path / "partial")
    checkpoint.save(b"so far")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(b"farther")
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]
    assert checkpoint.load() == b"so far"


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def short(data: bytes) -> bytes:
    return data[:20]


def emptied(_: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    at = len(data) * 2 // 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("spoil", [truncated, short, emptied, flipped])
def test_a_spoilt_checkpoint_is_not_gone_on_from(
    tiny: Base, tmp_path: Path, warnings: list[str], told: list[str], spoil: Callable[[bytes], bytes]
) -> None:
    """Reference: a heal that is not stopped; the file is named in a warning, and every step is logged once."""
    whole: list[Row] = []
    expected, path = trained(Student(tiny), "kl_rev", whole.append), tmp_path / "partial"
    stop_after(Student(tiny), "kl_rev", 3, path)
    path.write_bytes(spoil(path.read_bytes()))
    logged: list[Row] = []
    found = trained(Student(tiny), "kl_rev", logged.append, Checkpoint(path))
    assert warnings == [f"{path} does not match its checksum; starting from scratch"], f"warned {warnings}"
    assert not [line for line in told if "resuming" in line], "it went on from a spoilt file"
    assert_same(found, expected, f"{spoil.__name__}")
    assert logged == whole, f"the log was told steps {[row['step'] for row in logged]}"


TYPED = ("experiment=tiny", "reg=wd", "heal.steps=60", "runtime.checkpoint_seconds=0")


def figures(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run in this process, on the store below a folder, without durations."""
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="resume") as tracker:
        run(composed(*TYPED), Store(folder / "outputs/store"), tracker)
    timed = ("time", "round/heal_seconds")
    return [{name: value for name, value in row.items() if name not in timed} for row in command.rows(folder)]


def test_a_killed_process_leaves_what_another_goes_on_from(tmp_path: Path, told: list[str]) -> None:
    """Reference: a run that is not killed, in a store of its own: the same figures in every row."""
    killed, undisturbed = (tmp_path / name for name in ("killed", "undisturbed"))
    killed.mkdir()
    place = killed / "outputs/store/heal.heal"
    child = command.begin(killed, *TYPED, "hydra.run.dir=run")
    try:
        end = time.monotonic() + command.ENDS_S
        while not list(place.glob(".*.partial")):
            assert child.poll() is None, f"it ended, with {child.returncode}, before it was killed"
            assert time.monotonic() < end, "it never wrote a checkpoint"
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert not list(place.glob("[!.]*")), "this test came too late: the heal was done"
    found = figures(killed)
    (said,) = [line for line in told if line.startswith("resuming at step")]
    assert 0 < int(said.split()[3]) < 60, said
    left = [path.name for path in place.glob(".*.partial")]
    assert not left, f"{left} was left although there is a result"
    told.clear()
    expected = figures(undisturbed)
    assert not [line for line in told if "resuming at step" in line], "this test compares a run with itself"
    assert len(found) == len(expected) == 63, f"{len(found)} and {len(expected)} rows, not 60 steps and 3 others"
    differ = [(one, other) for one, other in zip(found, expected, strict=True) if one != other]
    assert not differ, f"{len(differ)} rows differ, first {differ[0]}"


ALIVE = {"place": "another machine", "pid": 1, "started": "1", "host": "there"}
LEFT = (".key.partial", ".key.failed", ".key.partial-scratch")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Files left by a heal that was killed, by one that failed, and by one killed in mid-save."""
    folder = tmp_path / "heal.heal"
    folder.mkdir()
    for name in LEFT:
        if name.endswith(".failed"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(b"x")
    return folder


def listed(place: Path, days: float) -> set[str]:
    """Files that remain when all of them have the given age."""
    then = time.time() - days * DAY
    for name in LEFT:
        os.utime(place / name, (then, then))
    return {path.name for path in leftovers(place.parent)}


def test_gc_spares_what_somebody_may_come_back_to(place: Path) -> None:
    """Reference: 30 days; an hour for partial files of dead processes, which nobody resumes."""
    assert listed(place, 0) == set(), "what is young was listed"
    assert listed(place, 29.9) == {".key.partial-scratch"}
    assert listed(place, 30.1) == set(LEFT), "what nobody came back to for 30 days was not listed"


def test_gc_spares_what_is_being_worked_on(place: Path) -> None:
    """Reference: the lease of a living process, as long as it is touched."""
    lease = place / ".key.lease"
    lease.write_text(json.dumps(ALIVE))
    assert listed(place, 31) == set(), "somebody goes on from this at the moment"
    os.utime(lease, (0, 0))
    assert listed(place, 31) == {*LEFT, ".key.lease"}, "a lease that nobody touched protects for ever"
