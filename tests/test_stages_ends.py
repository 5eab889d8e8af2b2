"""Ends of a run without a dose or with too few answers: in its first round, a later one, and as a cell of a sweep."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say
from helpers.toys import preset
from helpers.tracked import read

from steer_heal import model
from steer_heal.dose import Dose, DoseSearch, NoDose, Trials
from steer_heal.loop import run
from steer_heal.store import Store
from steer_heal.tracker import Tracker

READY = model._ready  # what `say` forbids: these commands do run
FEW = (
    "trait.generate=[Hello,What is love?,Tell me about rain,A long day at work]", "trait.held_out=[Who are you?]",
    "contexts.prompts=[Name a bird,Name a fish,Name a tree]", "heal.steps=1", "reg=nll",
    "eval.damage.texts=[{request: Hello, text: It was a long day at work.}]",
)  # fmt: skip


class Once(Dose):
    """Finds a dose in the first round, and in no later one."""

    def count(self) -> int:
        return 4

    def find(self, trials: Trials) -> DoseSearch:
        learned = bool(trials.student.history)  # type: ignore[attr-defined]
        tried = DoseSearch(
            () if learned else (0.5,) * 4, ({"alpha": 1.0, "survival": 0.25, "passed": float(not learned)},)
        )
        if learned:
            raise NoDose("dose=once: nothing passes", tried)
        return tried


def test_a_later_round_without_a_dose_keeps_what_the_earlier_ones_found(tmp_path: Path, warnings: list[str]) -> None:
    """Reference: one round of results, why there is no other, and the searches of both."""
    exp = preset(*FEW, "n_rounds=3").model_copy(update={"dose": Once(name="once")})
    with Tracker(tmp_path / "run") as tracker:
        result = run(exp, Store(tmp_path / "store"), tracker)
    assert [row["index"] for row in result.rows] == [0]
    assert len(result.rounds) == 1
    assert result.stopped == "round 1: dose=once: nothing passes"
    assert warnings[-1] == "stopped early, round 1: dose=once: nothing passes"
    logged = [(row["dose/round"], row["dose/passed"]) for row in read(tmp_path / "run") if "dose/trial" in row]
    assert logged == [(0, 1.0), (1, 0.0)]


@pytest.fixture
def ask(say: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Said]]:
    """`say` for commands that get as far as generating."""
    monkeypatch.setattr(model, "_ready", READY)
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield lambda typed: say(" ".join(["experiment=tiny", *(f"'{few}'" for few in FEW), typed]))
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("filter.length.min=13", "0 of 48 completions kept, fewer than heal.min_train=16; failed by filter: length 48"),
        ("filter.length.min=13 dose=walk dose.least=0.5", "dose=walk: not even 0.5 meets dose.target=0.5; survival by"),
        ("dose=iso_kl dose.target=1e-6 dose.least=1", "dose=iso_kl: not even 1 meets dose.target=1e-06; kl_p95 by"),
    ],
)
def test_a_first_round_that_comes_to_nothing_is_one_line_and_status_1(
    ask: Callable[[str], Said], here: Path, typed: str, line: str
) -> None:
    """Reference: the last line of the log on stderr; the traceback is only in the file."""
    said = ask(typed)
    assert said.code == 1, said.err[-500:]
    last = said.err.splitlines()[-1]
    assert f" E {line}" in last, last
    assert said.err.count(line) == 1
    assert "Traceback" not in said.err
    assert said.out == "", "there is nothing to compare"
    (log,) = here.glob("outputs/*/*/log.txt")
    assert "Traceback" in log.read_text()


def test_a_sweep_names_the_cells_that_came_to_nothing(ask: Callable[[str], Said]) -> None:
    """Reference: a line of why for each as it happens, and at the end which; test_cli.py has one whose others go on."""
    said = ask("dose=iso_kl dose.least=1 dose.most=1 dose.target=1e-6,1e-5 -m")
    assert said.code == 1
    assert "2 of 2 cells have no result" in said.err
    named = re.findall(r"^  dose\.target=(\S+) \((\S+)\) +failed +NoDose: ", said.err, re.MULTILINE)
    assert named == [("1e-06", "0-nll"), ("1e-05", "1-nll")]
    why = [line.partition(" E ")[2] for line in said.err.splitlines() if " E " in line]
    went = "this cell failed, the others continue: NoDose: dose=iso_kl: not even 1 meets dose.target="
    assert [line.partition(";")[0] for line in why] == [f"{went}1e-06", f"{went}1e-05"], said.err
    assert "Traceback" not in said.err
    assert said.out.startswith("no finished run in outputs/")
