"""Every steering method and every dose goes through one short round on the bundled real model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.compose import composed
from helpers.vectors import as_safetensors

from steer_heal.artifacts import Row, SteeringVector
from steer_heal.config import CONF
from steer_heal.eval.damage import Damage
from steer_heal.experiment import Experiment
from steer_heal.lm.student import Student
from steer_heal.loop import run
from steer_heal.model import load
from steer_heal.result import Result
from steer_heal.steer import extract
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig

pytestmark = [pytest.mark.slow(140), pytest.mark.long]

SHORT = (
    "reg=kl_rev", "tracker=jsonl", "match=none", "generate.max_new_tokens=12", "heal.steps=2", "heal.batch_size=2",
    "heal.min_train=2", "heal.n_keep=4", "heal.top_ups=0", "lora=r4", "min_coherence=0",
    "filter=[perplexity]", "filter.perplexity.max=1000", "eval=[trait,damage,text,strength]",
)  # fmt: skip
METHODS = sorted(path.stem for path in CONF.glob("steer/*.yaml"))
DOSES = sorted(path.stem for path in CONF.glob("dose/*.yaml"))


def short(*overrides: str) -> Experiment:
    """Few prompts, probes and texts, each the first of what the default has."""
    dosed = any(o.startswith("dose=") and o != "dose=fixed" for o in overrides)
    doses = ["dose.precision=0.2"] if dosed else ["dose.alpha=[0.5,0.8]"]
    whole = composed(*SHORT, *overrides, *doses)
    trait, damage = whole.trait, whole.eval["damage"]
    assert isinstance(damage, Damage)
    few = {"generate": trait.generate[:4], "held_out": trait.held_out[:2], "probes": trait.probes[:4]}
    evals = whole.eval | {"damage": damage.model_copy(update={"texts": damage.texts[:1]})}
    contexts = whole.contexts.model_copy(update={"prompts": whole.contexts.prompts[:8]})
    return whole.model_copy(update={"trait": trait.model_copy(update=few), "eval": evals, "contexts": contexts})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def vector(folder: Path) -> Path:
    """A vector file: what mean_diff finds at three blocks."""
    exp = short("steer.layers=[13,14,15]")
    personas = (exp.trait.positive, exp.trait.negative)
    found = Store(folder / "store")(
        extract, exp.steer, Student(load(exp.model)), personas, exp.contexts, runtime=exp.runtime
    )
    assert isinstance(found, SteeringVector)
    return as_safetensors(folder / "vector.safetensors", dict(zip(found.layers, found.directions, strict=True)))


def one_round(folder: Path, name: str, *overrides: str) -> tuple[Result, list[Row]]:
    """A round, and its rows of metrics. All rounds share a store, and so base's answers and figures."""
    exp = short(*overrides)
    exp.runtime.apply()
    with JsonlConfig(name="jsonl").open(folder / name, config={}, group=None, run_name=name) as tracker:
        result = run(exp, Store(folder / "store"), tracker)
    return result, [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def assert_sound(result: Result, name: str) -> Row:
    """Every figure is a number, and something was learned."""
    row = result.rows[0]
    wrong = [key for key, value in row.items() if not math.isfinite(value)]
    assert not wrong, f"{name}: {wrong}"
    assert len(result.rounds[0].adapter.curve) == 2
    moved = [factor for key, factor in result.rounds[0].adapter.factors.items() if "lora_B" in key and factor.any()]
    assert moved, f"{name}: the adapter learned nothing"
    return row


@pytest.mark.parametrize("method", METHODS)
def test_a_round_by_every_method(folder: Path, vector: Path, method: str) -> None:
    """All but a random direction move the trait the right way at a mild dose."""
    given = [f"steer={method}", *([f"steer.path={vector}"] if method == "file" else [])]
    result, rows = one_round(folder, method, *given)
    row = assert_sound(result, method)
    gain = row["steered/trait"] - row["base/trait"]
    assert method in ("random", "ablate") or gain > 0.05, f"{method}: steered, the trait moves by {gain}"
    assert row["steered/kl_p95"] > row["steered/kl_p50"] > 0, f"{method} leaves next-token distributions as they are"
    assert any("vector/norm" in r for r in rows) == (method != "prompt"), "norms are told of what has a vector"
    said = {answer.text for answer in result.rounds[0].models["steered"].answers.rows} & {
        a.text for a in result.rounds[0].models["base"].answers.rows
    }
    assert len(said) < 2, f"{method}: the steered model says what base says"


def test_a_round_at_layers_chosen_by_themselves(folder: Path) -> None:
    result, rows = one_round(folder, "auto", "steer.layers=auto")
    row = assert_sound(result, "auto")
    layers = [int(r["vector/layer"]) for r in rows if "vector/layer" in r]
    assert layers == list(range(layers[0], layers[0] + 6)), f"no fifth of 30 blocks in a row: {layers}"
    assert row["steered/kl_mean"] > 0


@pytest.mark.parametrize("dose", DOSES)
def test_a_round_at_every_dose(folder: Path, dose: str) -> None:
    """A search begins at 1, sees doses that pass and doses that do not, and ends between them."""
    target = {"walk": ["filter.perplexity.max=60"], "iso_kl": ["dose.target=2"]}.get(dose, [])
    result, rows = one_round(folder, dose, f"dose={dose}", *target)
    row = assert_sound(result, dose)
    trials = {r["dose/alpha"]: r["dose/passed"] for r in rows if "dose/alpha" in r}
    if dose == "fixed":
        assert not trials
        return
    passing, failing = ([alpha for alpha, passed in trials.items() if passed == state] for state in (1, 0))
    assert next(iter(trials)) == 1
    assert passing, f"nothing passes: {trials}"
    assert failing, f"nothing fails: {trials}"
    assert max(passing) < min(failing) <= 1.2 * max(passing), f"the search did not close in: {trials}"
    assert row["dose"] <= max(passing) * (1 + 1e-6), f"answers at {row['dose']} beyond the dose found"
    assert torch.tensor(list(trials)).isfinite().all()
