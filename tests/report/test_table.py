"""The table, the legend and the answers of a sweep, on made-up runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.made_up import SHOWN, made_up
from rich.console import Console

from steer_heal.eval import Column
from steer_heal.report.run_folder import Run, figure
from steer_heal.report.table import answers, best_rounds, legend, rounds_shown, table


def shown(runs: list[Run], width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(runs))
    return captured.get()


def test_every_other_steered_model_answers() -> None:
    """Reference: one line per distinct answer, under the first run that gives it; base once, healed by every run."""
    runs = [made_up("pca", "so warm"), made_up("logistic", "so warm"), made_up("random", "x", 2, 3)]
    assert answers(runs) == [
        ("base", "base says"), ("steered, nll steer=pca", "so warm"), ("steered, nll steer=random", "x"),
        ("healed, nll steer=pca", "healed of pca"), ("healed, nll steer=logistic", "healed of logistic"),
        ("healed, nll steer=random", "healed of random"),
    ]  # fmt: skip
    assert [who for who, _ in answers(runs[:2])][:2] == ["base", "steered"], "where all say the same it has no label"


@pytest.mark.parametrize(("dose", "there"), [(0.5, False), (0.75, True)])
def test_doses_are_shown_where_they_differ(dose: float, there: bool) -> None:
    text = shown([made_up("pca"), made_up("random", dose=dose)])
    assert ("dose" in text) == there, text
    assert ("0.75" in text) == there, text
    assert "1.40" in text or not there, text


def test_both_terms_of_the_trait_and_both_damages_stand_in_the_table() -> None:
    """Reference: the differences to base of the made-up figures, by hand; damage has three digits."""
    run = made_up(
        "pca", steered__trait=1.3, healed__trait=1.1, healed__trait_for=0.4, healed__trait_against=-0.2,
        steered__text_nll=1.25, healed__text_nll=0.75, healed__text_nll_t=0.625, healed__coherence=0.25,
    )  # fmt: skip
    text = shown([run], 96)
    expected = ["+0.80", "+0.60", "-0.10", "-0.70", "+0.750", "+0.250", "+0.125", "25%", "3/4", "2"]
    cells = text.splitlines()[-1].split()
    assert cells[1 : 1 + len(expected)] == expected, text
    assert all(len(line.rstrip()) <= 96 for line in text.splitlines()), "the table does not fit 96 columns"
    lines = legend([run]).splitlines()
    for name in ("trait", "for", "against", "damage", "at T", "coherent", "passed", "kept"):
        assert any(line.startswith(f"{name} ") for line in lines), f"{name} is not explained: {lines}"


def test_a_users_figure_is_shown_as_it_says(tmp_path: Path) -> None:
    """Reference: an outcome of one run, absent from another: absolute, as a share, or over base."""
    plain = Column("letters", "letters an answer", better="more", role="outcome", shown=("steered", "healed"))
    share = Column("polite", "polite answers", unit="share", role="outcome")
    over = Column("cost", "cost", "nats", "less", "damage", over_base="extra_cost")
    hidden = Column("inner", "not for the table")
    figures: dict[str, Any] = {f"{who}__{name}": value for who in ("base", "steered", "healed") for name, value in
               (("letters", 12.0), ("polite", 0.5), ("cost", 1.0), ("inner", 9.0))}  # fmt: skip
    run = made_up("pca", **figures | {"healed__cost": 1.5})
    run = dataclasses.replace(run, columns=(*SHOWN, plain, share, over, hidden))
    text = shown([run, made_up("random")], 140)
    own, other = text.splitlines()[-2:]
    assert own.split()[-7:] == ["50%", "+0.500", "3/4", "2", "-", "-", "1"], text
    assert own.split()[-9:-7] == ["12", "12"], text
    assert other.split()[-9:-5] == ["-", "-", "-", "-"], "a run without the figure shows a dash"
    assert "extra_cost" in text
    assert "inner" not in text


def test_a_figure_over_base_is_read_from_old_and_new_rows() -> None:
    """Reference: the difference; where only it was written, that."""
    column = Column("text_nll", "x", over_base="damage")
    assert figure({"healed/text_nll": 3.5, "base/text_nll": 3.0}, "healed", column) == 0.5
    assert figure({"healed/damage": 0.25}, "healed", column) == 0.25
    assert figure({}, "healed", column) is None


def test_the_last_round_is_shown_and_the_best_is_named_as_exploratory() -> None:
    first, last = made_up("pca", healed__trait=0.9).rounds[0], made_up("pca", healed__trait=0.7).rounds[0]
    run = dataclasses.replace(made_up("pca"), rounds=[first, last], best=0)
    text = shown([run])
    assert "+0.20" in text, text
    assert "+0.40" not in text, "the figures of the best round stand in the table"
    other = dataclasses.replace(made_up("random"), rounds=[{**first, "dose": 0.5}, {**last, "dose": 0.9}])
    assert "dose" not in shown([run, other], 100), "what was kept in later rounds tells no runs apart"
    assert rounds_shown([run, other]) == ["Each run's last round is shown, round 1 of 0-1."]
    assert "round 0 of nll steer=pca, round 1 of nll steer=random" in rounds_shown([made_up("pca"), other])[0]
    assert rounds_shown([made_up("pca")]) == []
    (sentence,) = best_rounds([run])
    assert "round 0 of 0-1" in sentence, sentence
    assert "exploratory" in sentence, sentence
    assert not best_rounds([dataclasses.replace(run, best=1)])
