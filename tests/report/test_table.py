"""The table and answers of a sweep over teachers and doses, on made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from steer_heal.report.run_folder import Run
from steer_heal.report.table import answers, table


def made_up(steer: str, said: str, dose: float, kl: float) -> Run:
    row = {f"{who}/{what}": 0.5 for who in ("base", "steered", "healed") for what in ("trait", "damage", "coherence")}
    row |= {"kept": 3.0, "generated": 4.0, "heal_barrier": 0.0, "heal_barrier_on": 0.0, "heal_idle": 0.0}
    row |= {"heal_shrink": 0.0, "heal_decays": 0.0, "dose": dose, "steered/kl_p95": kl}
    people = {"base": "base says", "steered": said, "healed": f"healed of {steer}"}
    told = {who: [{"prompt": "Hello", "text": text}] for who, text in people.items()}
    return Run(Path("."), (f"steer={steer}",), steer, "nll", "", None, 1.0, [row], 0, "", told, [])


def shown(runs: list[Run]) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(runs))
    return captured.get()


def test_every_other_steered_model_answers() -> None:
    """Reference: one line per distinct answer, under the first run that gives it; base once, healed by every run."""
    runs = [made_up("pca", "so warm", 0.5, 1.4), made_up("logistic", "so warm", 0.5, 1.4), made_up("random", "x", 2, 3)]
    assert answers(runs) == [
        ("base", "base says"), ("steered, nll steer=pca", "so warm"), ("steered, nll steer=random", "x"),
        ("healed, nll steer=pca", "healed of pca"), ("healed, nll steer=logistic", "healed of logistic"),
        ("healed, nll steer=random", "healed of random"),
    ]  # fmt: skip
    assert [who for who, _ in answers(runs[:2])][:2] == ["base", "steered"], "where all say the same it has no label"


@pytest.mark.parametrize(("dose", "there"), [(0.5, False), (0.75, True)])
def test_doses_are_shown_where_they_differ(dose: float, there: bool) -> None:
    text = shown([made_up("pca", "a", 0.5, 1.4), made_up("random", "b", dose, 1.4)])
    assert ("dose" in text) == there, text
    assert ("0.75" in text) == there, text
    assert "1.40" in text or not there, text
