"""The loop: a later round that fails, the best round, and errors before anything is made."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.compose import composed

from steer_heal import stages
from steer_heal.artifacts import Completions, NotFinite
from steer_heal.config import ConfigError
from steer_heal.filter import TooFew
from steer_heal.loop import run
from steer_heal.reg.nll import Nll
from steer_heal.result import Result
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig


def looped(folder: Path, *overrides: str, reg: str = "nll") -> tuple[Result, Store]:
    store, experiment = Store(folder / "store"), composed("experiment=tiny", f"reg={reg}", *overrides)
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="loop") as tracker:
        return run(experiment, store, tracker), store


def figures(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl without durations."""
    timed = ("time", "round/heal_seconds")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_in_gives_the_same_out(tmp_path: Path, dtype: str) -> None:
    """One configuration, seed and runtime into two empty stores; another seed shows that it could differ."""
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        _, store = looped(tmp_path / name, "n_rounds=2", f"model.dtype={dtype}", f"seed={seed}", reg="kl_rev")
        assert store.computed.count("heal.heal") == 2, "nothing was served from another run's store"
    one, two, other = (figures(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) > 10
    assert one == two
    assert one != other


def starving_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def require(filtered: Completions, n: int, max_len: int) -> None:
        calls.append(n)
        if len(calls) > call:
            raise TooFew("nothing left")

    monkeypatch.setattr(stages, "require", require)


def test_a_later_round_that_starves_keeps_what_the_earlier_ones_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starving_at(1, monkeypatch)
    result, _ = looped(tmp_path, "n_rounds=3")
    assert [row["index"] for row in result.rows] == [0]
    assert len(result.rounds) == 1
    assert set(result.rounds[0].models) == {"base", "steered", "healed"}, "its answers are lost"
    assert result.stopped == "round 1: nothing left"


def test_a_first_round_that_starves_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starving_at(0, monkeypatch)
    with pytest.raises(TooFew, match="nothing left"):
        looped(tmp_path)


def test_the_log_shows_the_last_step_also_where_some_completions_do_not_fit(tmp_path: Path, told: list[str]) -> None:
    """56 tokens leave some kept prompts without a target, so that there are fewer steps than completions imply."""
    result, _ = looped(tmp_path, "heal.max_len=56", "heal.min_train=8", "heal.epochs=15")
    last = int(result.rounds[0].adapter.curve[-1]["step"])
    assert result.rows[0]["heal_n_too_long"] > 0, "all of them fit"
    assert any(line.split()[:1] == [str(last)] for line in told), f"step {last} is not shown: {told}"


def test_a_round_under_the_coherence_floor_is_the_last(tmp_path: Path) -> None:
    result, _ = looped(tmp_path, "n_rounds=2", "min_coherence=1")
    assert len(result.rounds) == 1
    assert re.search(r"coherence \d\d?% is under 100%", result.stopped), result.stopped


def test_the_best_round_is_not_the_one_that_fell_apart() -> None:
    rows = [{"healed/trait": trait, "base/trait": 0.0, "healed/damage": 0.1} for trait in (0.5, 0.4, 9.0)]
    rounds: list[Any] = [SimpleNamespace(row=row) for row in rows]
    whole = Result(rounds=rounds)
    assert whole.best == 2
    assert dataclasses.replace(whole, collapsed=True).best == 0
    assert Result(rounds=rounds[:1], collapsed=True).best == 0, "there is no other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steer.layers=[99]", "the model has 4 blocks"),
        ("lora.first=0.5 lora.target_modules=[o_proj,layers.1.mlp.up_proj]", "up_proj of .* is in no block from 2 on"),
        ("lora.target_modules=[q_proj,input_layernorm]", "input_layernorm is not a linear layer"),
        ("lora.target_modules=[qproj]", "qproj is not in the model; there are down_proj, gate_proj"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_made(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        looped(tmp_path, *override.split())
    assert not list((tmp_path / "store").glob("*")), "a stage ran first"
    _, store = looped(tmp_path)
    assert "heal.heal" in store.computed, "the refusal left the model fit for the next cell"


@pytest.mark.parametrize(
    ("own", "message"),
    [({"kept": -1.0}, "a round has figures called kept already"), ({"mine": float("nan")}, "not finite: mine")],
)
def test_a_regularisers_figures_do_not_replace_a_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, float], message: str
) -> None:
    monkeypatch.setattr(Nll, "metrics", lambda self: own)
    with pytest.raises((ValueError, NotFinite), match=f"reg=nll: {message}"):
        looped(tmp_path)
