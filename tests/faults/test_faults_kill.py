"""SIGKILL at random moments of complete cells: a rerun ends with the same figures and computes nothing twice.

`pytest -s` shows how many kills hit which stage, and how much was lost or repeated.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import command
from helpers.faults import Children, Ended, assert_same_figures, children, frozen, held, published

from steer_heal.store import damage
from steer_heal.store.entries import leftovers
from steer_heal.sweep.status import probe_status

pytestmark = [pytest.mark.slow(110), pytest.mark.long]

CELL = ("heal.steps=14", "generate.max_new_tokens=4", "runtime.checkpoint_seconds=0")
CHAINS, LINKS = 11, 4  # cells, and kills of each
AT_LEAST = 30  # a kill that comes when its cell has just ended is none
# What each must be hit: all that takes long enough to be aimed at on a busy machine.
LONG = {"steer.extract", "generate.generate", "filter.likelihoods", "heal.reference.reference_states", "heal.heal",
        "eval.evaluate", "results"}  # fmt: skip
SEED = 20


@dataclass(frozen=True)
class Moment:
    """A stretch of a cell's work, which starts with a line of the log, or with the process."""

    order: int
    line: str | None  # how it ends
    seconds: float  # that it took undisturbed
    result: str | None  # stage/key that is published in it, after which it does not come again

    @property
    def stage(self) -> str:
        return self.result.partition("/")[0] if self.result else "results" if self.line else "start"


@dataclass
class Tally:
    """Totals over all kills."""

    hit: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)  # how the cell's status looked afterwards
    repeated: list[str] = field(default_factory=list)  # published before, and computed again
    spoilt: list[str] = field(default_factory=list)  # there after a kill, but not whole
    steps: list[int] = field(default_factory=list)  # of a heal, taken again, by kill

    def __str__(self) -> str:
        hit = ", ".join(f"{stage} {n}" for stage, n in sorted(self.hit.items()))
        return (
            f"{self.hit.total()} kills: {hit}; then {dict(self.states)}; results computed again {len(self.repeated)}, "
            f"not whole {len(self.spoilt)}; heals gone on with {len(self.steps)}, steps taken again {sum(self.steps)}"
        )


@dataclass(frozen=True)
class Cells:
    """Saved equivalent cells; the first was run undisturbed."""

    folders: list[Path]
    whole: Ended
    fork: Children

    @property
    def undisturbed(self) -> Path:
        return self.folders[0]


def store_of(folder: Path) -> Path:
    return folder.with_name(f"store-{folder.name}")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    root = tmp_path_factory.mktemp("kills")
    folders = frozen([CELL] * (1 + CHAINS), root)
    with children(root) as fork:
        whole = fork.run(folders[0])
        assert whole.code == 0, f"undisturbed it ended with {whole.code}; it said {whole.log[-2000:]}"
        yield Cells(folders, whole, fork)


def moments(cells: Cells) -> list[Moment]:
    """The stretches of the undisturbed cell, in order."""
    lines = cells.whole.log.splitlines()
    stamps = [time.mktime(time.strptime(s[:19], "%Y-%m-%d %H:%M:%S")) + float(s[19:23]) for s in lines]
    marks = [i for i, s in enumerate(lines) if re.search(r" computing \S+$| healing with | rounds done: ", s)]
    ends = [*stamps[1:], stamps[-1] + 0.2]  # after the last line result.json and the pictures are written
    found = [Moment(0, None, 0.05, None)]
    heal = next(path for path in cells.whole.begun if path.startswith("heal.heal/"))
    for a, b in pairwise([*marks, len(lines)]):
        text = re.sub(r"^\S+ \S+ [A-Z]+ ", "", lines[a])
        path = "/".join(Path(text).parts[-2:]) if text.startswith("computing ") else None
        result = heal if text.startswith("healing with ") else path
        line = f"/{path}" if path else text  # each cell has a store of its own
        found.append(Moment(a + 1, line, ends[b - 1] - stamps[a], result))
    return found


def plan(cells: Cells, rng: random.Random) -> list[list[Moment]]:
    """Moments for each chain: every stretch once, and once more the first half of those that must be hit.

    What is left goes to the steps of the heal.
    """
    all_of_them = moments(cells)
    stages = Counter(m.stage for m in all_of_them)
    dealt = [*all_of_them]
    dealt += [replace(m, seconds=m.seconds / 2) for m in all_of_them if m.stage in LONG and stages[m.stage] < 3]
    (short,) = (m for m in all_of_them if m.stage.startswith("heal.reference."))  # the heal gets ready in it as well
    dealt += [replace(short, seconds=short.seconds / 6)] * 2
    assert len(dealt) < CHAINS * LINKS, f"{len(dealt)} moments, and fewer kills"
    (steps,) = (m for m in all_of_them if m.line and m.line.startswith("healing with "))
    dealt += [steps] * (CHAINS * LINKS - len(dealt))
    rng.shuffle(dealt)
    return [sorted(dealt[i::CHAINS], key=lambda m: m.order) for i in range(CHAINS)]


def hit(store: Path, ended: Ended) -> str:
    """The stage that a killed attempt was in."""
    leases = held(store)
    inner = [path for path in ended.begun if path in leases]
    if inner:
        return inner[-1].partition("/")[0]
    return "results" if " rounds done: " in ended.log else "between stages"


def heal_steps(folder: Path) -> int:
    """Steps that the latest attempt has logged."""
    path = folder / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return sum("heal/step" in json.loads(line) for line in whole)


def attempt(cells: Cells, folder: Path, tally: Tally, *when: Any) -> Ended:
    """Make one more attempt; everything published before must stay unchanged."""
    store, steps = store_of(folder), heal_steps(folder)
    before, in_heal = published(store), any(path.startswith("heal.heal/") for path in held(store))
    ended = cells.fork.run(folder, *when)
    after = published(store)
    tally.repeated += [path for path in before if path in ended.begun or after.get(path) != before[path]]
    tally.spoilt += [path for path in after if damage(store / path) != ""]
    if in_heal and ended.goes_on is not None:
        tally.steps.append(steps - ended.goes_on)
    return ended


def killed(cells: Cells, folder: Path, moment: Moment, wait: float, tally: Tally) -> None:
    """Kill an attempt once; one whose moment has already passed is not started."""
    store = store_of(folder)
    if moment.result in published(store):
        return
    ended = attempt(cells, folder, tally, moment.line, wait)
    assert ended.code in (0, -9), f"killed at {moment}: it ended with {ended.code}; it said {ended.log[-2000:]}"
    if ended.code == -9:
        tally.hit[hit(store, ended)] += 1
        status = probe_status(folder)
        tally.states[status.state] += 1
        assert status.state in ("lost", "waiting"), f"killed at {moment}: its status is {status}"


def test_killed_at_any_moment_it_goes_on_to_the_same_figures(cells: Cells) -> None:
    """Reference: a cell that is not killed."""
    rng, tally, begun = random.Random(SEED), Tally(), time.monotonic()
    for folder, chain in zip(cells.folders[1:], plan(cells, rng), strict=True):
        for moment in chain:
            killed(cells, folder, moment, rng.random() * moment.seconds, tally)
        last = attempt(cells, folder, tally)
        what = f"cell {folder.name}, killed at {[m.line for m in chain]}"
        assert last.code == 0, f"{what}: the rerun ended with {last.code}; it said {last.log[-2000:]}"
        assert_same_figures(folder, cells.undisturbed, what)
        record = command.result(folder)
        assert record["computed"] == done_in_order(last), f"{what}: {record}"
        assert set(record["used"]) <= {path.partition("/")[2] for path in published(store_of(folder))}
        assert published(store_of(folder)).keys() == published(store_of(cells.undisturbed)).keys(), f"{what}: the store"
        assert_nobody_waits(store_of(folder), what)
        assert probe_status(folder).state == "finished", f"{what}: {probe_status(folder)}"
    print(f"\n{tally}; {len(cells.folders) - 1} cells, {time.monotonic() - begun:.0f} s")
    assert not tally.repeated, f"published before a kill and computed again: {tally.repeated}"
    assert not tally.spoilt, f"half-written, and taken for results: {tally.spoilt}"
    assert all(0 <= again <= 1 for again in tally.steps), f"steps of heals taken again: {tally.steps}"
    assert tally.steps, "no heal was gone on with: this test shows nothing about heals"
    assert tally.hit.total() >= AT_LEAST, f"only {tally}"
    assert tally.hit.keys() >= LONG, f"never hit: {LONG - tally.hit.keys()}; {tally}"


def assert_nobody_waits(store: Path, what: str) -> None:
    """A process killed after publishing may leave a lease: nobody requests its result again, and gc finds it."""
    gone = [f"{path.parent.name}/{path.name[1:-6]}" for path in leftovers(store) if path.name.endswith(".lease")]
    assert sorted(held(store)) == sorted(gone), f"{what}: leases {held(store)}, of which gc finds {gone}"
    assert set(gone) <= published(store).keys(), f"{what}: a lease of the dead for what is not there"


def done_in_order(ended: Ended) -> list[str]:
    """Stages in order of completion: what a heal or an evaluation requests while it is computed is there before it."""
    found, waiting = list[str](), list[str]()  # computed; begun, each by the one before it
    at = None
    for stage, where in re.findall(r" INFO (\S+?)(?:: ([^\n]+))?\n\S+ \S+ DEBUG computing ", ended.log):
        inside = waiting and where == at and (waiting[0] == "eval.evaluate" or stage.startswith("heal.reference."))
        if not inside:
            found += reversed(waiting)
            waiting = []
        waiting.append(stage)
        at = where
    return [*found, *reversed(waiting)]


def test_three_killed_processes_and_a_fourth(cells: Cells, tmp_path: Path) -> None:
    """The command as users type it, killed three times in one folder after a number of results."""
    store, there = tmp_path / "outputs/store", dict[str, int]()
    overrides = ("experiment=tiny", *CELL, "hydra.run.dir=run")
    for results in (2, 9, 17):
        child = command.begin(tmp_path, *overrides)
        try:
            end = time.monotonic() + command.ENDS_S
            while len(published(store)) < results:
                assert child.poll() is None, f"it ended, with {child.returncode}, before it was killed"
                assert time.monotonic() < end, f"{len(published(store))} results, and no more"
                time.sleep(0.002)
        finally:
            child.kill()
            child.wait()
        now = published(store)
        changed = [path for path in there if now.get(path) != there[path]]
        assert not changed, f"computed again after a kill: {changed}"
        spoilt = [path for path in now if damage(store / path) != ""]
        assert not spoilt, f"half-written, and taken for results: {spoilt}"
        assert not (tmp_path / "run/result.json").exists(), f"killed after {len(now)} results, it has a result"
        there = now
    said = command.run(tmp_path, *overrides)
    assert said.returncode == 0, said.stderr
    assert_same_figures(tmp_path / "run", cells.undisturbed, "killed three times")
    record, now = command.result(tmp_path / "run"), published(store)
    again = [path for path in there if now[path] != there[path]]
    assert not again, f"computed again: {again}"
    assert len(record["computed"]) == len(now) - len(there), f"{record['computed']}, and {len(there)} were there"
    print(f"\n3 kills of processes; results there at each: 2, 9, 17 or more; computed again {len(again)}")
