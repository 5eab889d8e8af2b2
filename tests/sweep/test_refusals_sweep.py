"""Errors of a sweep: nothing starts, and the line names the cell; and equivalent cells."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from loguru import logger

from steer_heal.config import CONF
from steer_heal.sweep.preflight import check_sweep

pytestmark = pytest.mark.slow(18)

# Sweeps: what is typed after `-m model=tiny`; the cell, as the line names it; what it says of it.
CELLS = [
    ("reg=nll,kl_rev tau=0.1,-1", "reg=nll tau=-1", "tau=-1 is not allowed: must be a number >= 0, auto, or a"),
    ("seed=1,true", "seed=True", "not a truth value"),
    ("reg=kl_rev lam=1,nan", "reg=kl_rev lam=nan", "reg.lam=nan is not allowed: must be a finite"),
    ("'n_rounds=choice(1,0)' 'seed=range(0,3)'", "n_rounds=0 seed=0", "n_rounds=0 is not allowed"),
    ("seed=0,1 trait.probes=[]", "seed=0 trait.probes=[]", "at least 1 item"),
    ("reg=nll,klrev", "reg=klrev", "no such option. Did you mean kl_rev? There are kl_fwd,"),
    ("'filter=[length],[perplexty]'", "filter=[perplexty]", "filter=perplexty: there is no such option."),
    ("seed=0,1 'reg=[nll,wd]'", "reg=[nll,wd]", "write reg=a,b"),
    ("seed=0,1 lamm=1,2", "seed=0 lamm=1", "lamm: there is no such knob. Did you mean lam?"),
    ("seed=0,1 +lam=1,2", "seed=0 +lam=1", "+lam: it already exists"),
    ("'lam=1,${nowhere}'", "nowhere", "lam: Interpolation key 'nowhere' not found"),
    ("seed=1,0 'n_rounds=${seed}'", "seed=0 n_rounds=", "n_rounds=0 is not allowed"),
    ("reg=nll,wd reg._target_=os.system", "reg=nll reg._target_=os.system", "an option below steer_heal"),
    ("'steer.layers=[1],[99]'", "steer.layers=[99]", "the model has 4 blocks, 0 to 3"),
    ("reg=nll,wd decay=step lam=1,4000", "reg=wd decay=step lam=4000", "whose decay keeps the signs of the weights"),
    ("seed=0,1 runtime.store=outputs/store,/dev/null/x", "seed=0 runtime.store=/dev/null/x", "cannot be written"),
    ("model=tiny,hub", "model=hub", "model.id: missing"),
]


@pytest.mark.parametrize(("typed", "cell", "said"), CELLS, ids=[typed for typed, *_ in CELLS])
def test_of_a_sweep_nothing_starts_and_the_line_names_the_cell(
    say: Callable[[str], Said], typed: str, cell: str, said: str
) -> None:
    """The first cells are valid and would have started."""
    line = say(f"-m model=tiny {typed}").refused(cell, said)
    assert line.index(cell) <= line.index(said)


@pytest.mark.parametrize(
    ("typed", "field", "said"),
    [
        ("hydra.sweep.dir=/dev/null/x reg=nll,wd", "hydra.sweep.dir='/dev/null/x'", "cannot be written"),
        ("'hydra.sweep.dir=${nowhere}' reg=nll,wd", "hydra.sweep.dir", "'nowhere' not found"),
        ("seed=0,1 lam=[1", "lam=[1", "write a list as 'path=[a,b]'"),
        (
            "seed=0,1 experiment=tyni",
            "experiment=tyni",
            "There are distil_prompt, fewer_steps, one_long_round, original, random_vector, revised",
        ),
    ],
)
def test_what_is_wrong_with_all_cells_is_said_without_one(
    say: Callable[[str], Said], typed: str, field: str, said: str
) -> None:
    line = say(f"-m model=tiny {typed}").refused(field, said)
    assert "seed=0 " not in line


@pytest.mark.parametrize(
    "typed", ["'+hydra.sweeper.params={lam: \"0.1,-1\"}'", "+hydra.sweeper.params.lam=\"'0.1,-1'\""]
)
def test_a_sweep_given_as_the_sweepers_parameters_is_checked(say: Callable[[str], Said], typed: str) -> None:
    say(f"-m model=tiny {typed}").refused("lam=-1", "greater than or equal to 0")


@pytest.mark.parametrize(
    ("mode", "typed"),
    [
        ("", "-m --config-dir {more}"),
        ("", "-m hydra.searchpath=[{more}]"),
        ("mode: MULTIRUN", "--config-dir {more}"),
    ],
    ids=["config-dir", "searchpath", "mode"],
)
def test_a_sweep_written_in_a_preset_is_checked(
    say: Callable[[str], Said], tmp_path: Path, mode: str, typed: str
) -> None:
    """A sweep's cells need not be in an override, and neither need the request to sweep."""
    preset = tmp_path / "more/experiment/mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n"
        f"hydra:\n  {mode}\n  sweeper:\n    params:\n      reg: nll,kl_rev\n      tau: 0.1,-1\n"
    )
    typed = f"{typed.format(more=tmp_path / 'more')} experiment=mine"
    say(typed).refused("reg=nll tau=-1 experiment=mine: tau=-1", "a number >= 0, auto, or a percentile")
    say(f"{typed} tau=1,nan").refused(
        "reg=nll tau=nan experiment=mine: tau=nan", "a number >= 0, auto, or a percentile"
    )


def checked(*typed: str) -> list[list[str]]:
    """The groups of equivalent cells of a sweep."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composing = GlobalHydra.instance().hydra
        assert composing is not None
        given = ["model=tiny", *typed, "hydra.mode=MULTIRUN"]
        return check_sweep(composing.compose_config("config", given, RunMode.MULTIRUN)).equivalent


@pytest.mark.parametrize(
    ("typed", "same"),
    [
        ("reg=nll lam=0.1,1", [["reg=nll lam=0.1", "reg=nll lam=1"]]),
        ("reg=nll,kl_rev lam=0.1,1", [["reg=nll lam=0.1", "reg=nll lam=1"]]),
        ("reg=wd tau=0.1,1", [["reg=wd tau=0.1", "reg=wd tau=1"]]),
        ("reg=kl_rev lam=0.1,1", []),
        ("reg=kl_fwd tau=0.1,1", []),
        ("reg=nll,kl_fwd,kl_rev,wd", []),
        ("seed=0,1", []),
        ("lora=r16,r8 lora.r=16", [["lora=r16 lora.r=16", "lora=r8 lora.r=16"]]),
        ("heal.reference=base,prev", [["heal.reference=base", "heal.reference=prev"]]),
        ("heal.reference=base,prev n_rounds=2", []),
        ("runtime.micro_batch=4,8", [["runtime.micro_batch=4", "runtime.micro_batch=8"]]),
    ],
)
def test_cells_that_mean_the_same_are_named(here: Path, typed: str, same: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.chdir(here)
    assert checked(*typed.split()) == [[f"model=tiny {cell}" for cell in group] for group in same]
    assert list(here.iterdir()) == [], "a check makes nothing"


def test_a_single_item_is_doubted_once_a_sweep(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a cell."""
    monkeypatch.chdir(here)
    told: list[str] = []
    sink = logger.add(told.append, format="{level} {message}")
    checked("seed=0,1,2", "trait.held_out=[one]")
    logger.remove(sink)
    assert [line.partition(":")[0] for line in told] == ["WARNING trait.held_out has one item only"]


def test_hundreds_of_cells_take_one_composition_a_choice_of_options(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composing takes a good part of a second; 500 compositions would be minutes before anything is seen."""
    monkeypatch.chdir(here)
    made: list[list[str]] = []  # the options of each composition
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, config: Any, overrides: list[str]) -> Any:
        made.append(overrides)
        return compose(self, config, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    took: dict[int, float] = {}
    for cells in (20, 500):
        made.clear()
        begun = time.perf_counter()
        assert checked("reg=nll,kl_fwd,kl_rev,wd", f"seed=range(0,{cells // 4})") == []
        took[cells] = time.perf_counter() - begun
        assert len(made) == 4, f"{len(made)} compositions for 4 combinations of options"
    assert took[500] < 15 * took[20], f"20 cells take {took[20]:.1f} s, 500 take {took[500]:.1f} s"
