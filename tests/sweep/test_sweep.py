"""A sweep over the regularisers: what is logged, what is shared, and that repeating it costs nothing."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.command import result, rows, run
from helpers.compose import composed
from helpers.wandb_offline import offline_runs

pytestmark = pytest.mark.slow(35)

REGULARISERS = ("nll", "kl_fwd", "kl_rev", "wd")
SWEEP = ("-m", f"reg={','.join(REGULARISERS)}", "experiment=tiny", "n_rounds=2", "match=gate")
PAGE = Path(__file__).parents[2] / "docs/metrics.md"


@dataclass(frozen=True)
class Sweep:
    """A finished sweep of the four regularisers."""

    folder: Path
    out: str

    @property
    def cells(self) -> dict[str, Path]:
        return {name: self.folder / f"{i}-{name}" for i, name in enumerate(REGULARISERS)}

    @property
    def computed(self) -> dict[str, Counter[str]]:
        """Number of times that each cell computed each stage."""
        return {name: Counter(result(cell)["computed"]) for name, cell in self.cells.items()}

    def heal(self, name: str) -> list[dict[str, Any]]:
        return [row for row in rows(self.cells[name]) if "heal/step" in row]

    def rounds(self, name: str) -> list[dict[str, Any]]:
        return [row for row in rows(self.cells[name]) if "round/index" in row]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def sweep(root: Path) -> Sweep:
    said = run(root, *SWEEP, "tracker=wandb", WANDB_MODE="offline")
    assert said.returncode == 0, said.stderr
    (folder,) = root.glob("outputs/*/*-sweep")
    return Sweep(folder, said.stdout)


@pytest.fixture(scope="module")
def again(root: Path, sweep: Sweep) -> Sweep:
    """The same sweep once more, in the same place; the tracker is no part of what a result is."""
    said = run(root, *SWEEP)
    assert said.returncode == 0, said.stderr
    (folder,) = set(root.glob("outputs/*/*-sweep")) - {sweep.folder}
    return Sweep(folder, said.stdout)


def promised() -> Iterator[tuple[str, str]]:
    """Key and time of every figure in the page's table of logged figures."""
    table = PAGE.read_text(encoding="utf-8").partition("## What is logged")[2].partition("\n## ")[0]
    for line in (line for line in table.splitlines() if line.startswith("| `")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        prefix = ""
        for key in re.findall(r"`([^`]+)`", cells[0]):
            before, braced, after = re.fullmatch(r"([^{]*)(\{.*\})?(.*)", key.replace("…", prefix, 1)).groups()  # type: ignore[union-attr]
            prefix = f"{before}{braced}" if braced else prefix
            for name in (braced or "{}")[1:-1].split(","):
                yield f"{before}{name}{after}", cells[-1]


LOGGED = dict(promised())


def test_the_pages_table_is_read() -> None:
    assert LOGGED["heal/nll"] == "every optimiser step"
    some = {"heal/kl_rev", "heal/val_nll", "round/steered/coherence", "round/healed/kl_base", "round/steered/damage_t"}
    assert some <= LOGGED.keys()
    assert len(LOGGED) > 25


def test_the_table_has_one_row_a_regulariser(sweep: Sweep) -> None:
    shown = re.findall(r"^(nll|kl_fwd|kl_rev|wd) .*\d", sweep.out, re.MULTILINE)
    assert sorted(shown[:4]) == sorted(REGULARISERS), "the comparison, by damage"
    assert shown[4:] == list(REGULARISERS), "then the cells, in their order"
    assert (sweep.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(sweep.folder.name) in sweep.out, "where everything is"


@pytest.mark.parametrize("name", REGULARISERS)
def test_everything_promised_is_logged(sweep: Sweep, name: str) -> None:
    heal, rounds = sweep.heal(name), sweep.rounds(name)
    assert [row["round/index"] for row in rounds] == [0, 1]
    assert [row["heal/step"] for row in heal] == list(range(len(heal))), "steps count through the rounds"
    per_round = len(heal) // 2
    for key, when in LOGGED.items():
        if key.startswith("round/"):
            reached = {row["round/index"] for row in rounds if row["round/matched/reached"]}
            where = reached if when == "each round that reaches T*" else {0, 1}
            where = set() if when == "each round of a barrier" and not name.startswith("kl_") else where
            lacking = [row["round/index"] for row in rounds if (key in row) != (row["round/index"] in where)]
            assert not lacking, f"{key} is wrongly there or lacking in rounds {lacking}"
        elif key.startswith(("vector/", "dose/")):  # doses are fixed here, so there is no search
            some = [row for row in rows(sweep.cells[name]) if "vector/layer" in row]
            assert len(some) == 4, f"{len(some)} rows of a vector, not one a round and block"
            assert all((key in row) == key.startswith("vector/") for row in some), f"{key} in rows of a vector"
        elif when == "every optimiser step":
            lacking = [row["heal/step"] for row in heal if key not in row]
            assert not lacking, f"{key} is lacking at steps {lacking}"
        else:
            for part in (heal[:per_round], heal[per_round:]):
                assert sum(key in row for row in part) >= 2, f"{key} is measured less than twice a round"
    for row in [*heal, *rounds]:
        odd = {
            key: value for key, value in row.items() if not (isinstance(value, int | float) and math.isfinite(value))
        }
        assert not odd, f"not finite: {odd}"


def test_only_barriers_put_a_divergence_in_the_loss(sweep: Sweep) -> None:
    for name in REGULARISERS:
        curve = sweep.heal(name)
        late = [row["heal/kl"] for row in curve[-3:]]
        if name.startswith("kl_"):
            assert min(late) > 0, f"{name}: kl is {late} in the last steps"
            assert curve[-1]["heal/kl"] == pytest.approx(curve[-1][f"heal/{name}"], rel=1e-3), "it measures itself"
            assert max(row["heal/barrier_on"] for row in curve) > 0
        else:
            assert {row["heal/kl"] for row in curve} == {0.0}, f"{name} has no divergence in its loss"
            assert all(row["heal/loss"] == row["heal/nll"] for row in curve), f"{name}: its loss is nll"
        assert curve[-1]["heal/kl_rev"] > 0, f"{name}: the measured divergence"


def test_the_regularisers_begin_alike_and_part(sweep: Sweep) -> None:
    curves = {name: [row["heal/nll"] for row in sweep.heal(name)] for name in REGULARISERS}
    assert len({curve[0] for curve in curves.values()}) == 1, "the same data and the same initial adapter"
    for one, other in itertools.combinations(REGULARISERS, 2):
        assert curves[one] != curves[other], f"{one} and {other} trained the same"


def test_round_0_is_computed_once_up_to_the_heal(sweep: Sweep) -> None:
    """Vector, generations, scores, the reference's states and what base and steered are serve every regulariser."""
    evals = composed("experiment=tiny").eval.values()
    shared = {
        "steer.extract": 1,
        "generate.generate": 3,
        "filter.likelihoods": 3,
        "lm.kl.answer_states": 1,  # of base, at the steered answers: generation had the others
        "filter.sift": 2,
        "eval.evaluate": sum(who in option.models for option in evals for who in ("base", "steered")),
        "heal.reference.reference_states": 1,
    }
    first, *others = sweep.computed.values()
    for name, other in zip(REGULARISERS[1:], others, strict=True):
        assert first - other == Counter(shared), f"what nll computed and {name} found"
        assert not other - first, f"{name} computed what nll did not"
        assert other["steer.extract"] == 1, f"{name}: the vector of round 1 alone is its own"
        assert other["heal.heal"] == 2
    values = [sweep.rounds(name)[0] for name in REGULARISERS]
    for key in ("round/base/trait", "round/steered/trait", "round/steered/damage", "round/dose", "round/kept"):
        assert len({row[key] for row in values}) == 1, f"{key} of round 0 differs"


def test_the_store_holds_what_was_computed(sweep: Sweep, root: Path) -> None:
    """One entry a computation: nothing twice, nothing lost, nothing half written."""
    stages = [path for path in (root / "outputs/store").iterdir() if path.is_dir()]
    held = {stage.name: sum((entry / "manifest.json").is_file() for entry in stage.iterdir()) for stage in stages}
    assert held == dict(sum(sweep.computed.values(), Counter()))
    assert not [path for stage in stages for path in stage.glob(".*") if path.is_dir()], "left over from writing"


def test_the_same_sweep_again_computes_nothing(sweep: Sweep, again: Sweep) -> None:
    assert not any(again.computed.values()), again.computed

    def figures(cell: Path) -> list[dict[str, Any]]:
        timed = ("time", "round/heal_seconds")
        return [{key: value for key, value in row.items() if key not in timed} for row in rows(cell)]

    for name in REGULARISERS:
        assert figures(again.cells[name]) == figures(sweep.cells[name]), f"{name} replayed other figures"
        first, second = (result(which.cells[name]) for which in (sweep, again))
        assert (first["answers"], first["adapters"]) == (second["answers"], second["adapters"])


@pytest.mark.parametrize("name", REGULARISERS)
def test_wandb_has_the_same_run(sweep: Sweep, name: str) -> None:
    """One offline run a cell, grouped by the sweep."""
    (offline,) = offline_runs(sweep.cells[name])
    assert (offline.group, offline.name, offline.exit_code) == (sweep.folder.name, sweep.cells[name].name, 0)
    assert offline.config["reg"]["name"] == name
    assert offline.config["code"] == result(sweep.cells[name])["code"], "which code made it"
    assert offline.step_metrics == {
        "heal/*": "heal/step", "round/*": "round/index", "dose/*": "dose/trial", "vector/*": "vector/layer",
    }  # fmt: skip
    logged = [{key: value for key, value in row.items() if not key.startswith("_")} for row in offline.rows]
    written = [{key: value for key, value in row.items() if key != "time"} for row in rows(sweep.cells[name])]
    assert [row for row in logged if row.keys() & {"heal/step", "round/index", "vector/layer"}] == written
    assert offline.summary["round/healed/trait"] == sweep.rounds(name)[-1]["round/healed/trait"]
