"""Comparisons of finished runs: what forms a row, what it is compared with, and what may be said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.finished import PROBES, finished, sweep
from rich.console import Console

from steer_heal.artifacts import read_jsonl
from steer_heal.compare import main
from steer_heal.config import ConfigError
from steer_heal.report.comparison import Comparison, compared
from steer_heal.report.comparison_table import notes, rendered
from steer_heal.report.replicates import gathered, matched


def comparison(folder: Path, by: tuple[str, ...] = (), against: str | None = None) -> Comparison:
    (found,) = compared(gathered([folder]), by, against)
    return found


def verdicts(found: Comparison) -> dict[str, str]:
    return {line.row.label: "control" if line.is_control else str(line.verdict) for line in found.lines}


def test_rows_are_grouped_over_seeds_and_sorted_by_damage_at_the_same_trait(tmp_path: Path) -> None:
    found = comparison(sweep(tmp_path, {"nll": 0.10, "kl_rev": 0.06, "kl_fwd": 0.101, "wd": 0.15}, noise=0.0005))
    assert [line.row.label for line in found.lines] == ["kl_rev", "nll", "kl_fwd", "wd"]
    assert all(line.row.n == 5 for line in found.lines)
    assert verdicts(found) == {"kl_rev": "better", "nll": "control", "kl_fwd": "equivalent", "wd": "worse"}
    assert found.compared == 3
    line = found.lines[0]
    assert line.contrast is not None
    assert line.contrast.value == pytest.approx(-0.04, abs=0.002)
    assert line.at_target is not None
    assert line.at_target.value == pytest.approx(0.06, abs=0.002)
    assert line.damage is not None
    assert line.damage.value == pytest.approx(0.24, abs=0.01), "at gate 1, where it has gained twice as much"


def test_the_contrast_is_made_of_the_items_in_the_folders(tmp_path: Path) -> None:
    """Reference: the files, read by hand; the slope from the frontier's points on either side of T* = 0.3."""
    runs = [finished(tmp_path / str(seed), "nll", seed, 0.1) for seed in range(2)]
    found = matched(gathered([runs[1]])[0])
    base, own = (
        {r["id"]: r for r in read_jsonl(runs[1] / "items" / who / "trait.jsonl")} for who in ("base", "round-0-matched")
    )
    assert found.gains == pytest.approx([own[i]["trait"] - base[i]["trait"] for i in sorted(base)])
    assert found.gains.mean() == pytest.approx(0.3)
    assert len(found.gains) == PROBES
    damage = [r["text_nll"] - 3 for r in read_jsonl(runs[1] / "items" / "round-0-matched" / "damage.jsonl")]
    assert sorted(found.damage) == pytest.approx(sorted(damage))
    curve = np.mean(damage) / 0.3**2
    assert found.slope == pytest.approx(curve * (0.15 + 0.45)), "gates 0.25 and 0.75"


def test_too_few_seeds_have_no_verdict(tmp_path: Path) -> None:
    found = comparison(sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05}, seeds=1))
    assert verdicts(found)["kl_rev"] == "no verdict (1 seed)"
    (line,) = (line for line in found.lines if not line.is_control)
    assert line.contrast is not None
    assert line.contrast.value == pytest.approx(-0.05, abs=0.005), "the difference is shown all the same"
    assert found.compared == 0
    more = comparison(sweep(tmp_path / "more", {"nll": 0.1, "kl_rev": 0.05}, seeds=4))
    assert verdicts(more)["kl_rev"] == "no verdict (4 seeds)"


def test_who_does_not_reach_the_target_has_no_contrast(tmp_path: Path) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    finished(tmp_path / "kl_rev-3", "kl_rev", 3, 0.05, gain=0.2)
    found = comparison(tmp_path)
    assert verdicts(found)["kl_rev"] == "not reached (1 of 5)"
    finished(tmp_path / "kl_rev-3", "kl_rev", 3, 0.05)
    finished(tmp_path / "nll-2", "nll", 2, 0.05, gain=0.2)
    assert verdicts(comparison(tmp_path))["kl_rev"] == "not reached (nll, 1 of 5)"


@pytest.mark.parametrize(
    ("how", "told"),
    [({}, "better"), ({"tempered": 0.1}, "better, not robust"), ({"raw": 0.13}, "better, not robust"),
     ({"raw": 0.1}, "better")],
)  # fmt: skip
def test_a_verdict_that_another_damage_turns_is_not_robust(tmp_path: Path, how: dict[str, Any], told: str) -> None:
    sweep(tmp_path, {"nll": 0.1})
    sweep(tmp_path, {"kl_rev": 0.05}, **how)
    assert verdicts(comparison(tmp_path))["kl_rev"] == told


def test_runs_of_another_base_or_trait_are_compared_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    sweep(tmp_path / "other", {"nll": 0.2}, basis={"model": "made up", "trait": "formality"})
    found = compared(gathered([tmp_path]))
    assert [len(one.lines) for one in found] == [2, 1]
    assert main([str(tmp_path), str(tmp_path / "other")]) == 0
    assert "Compared apart, since figures of different trait have no zero in common" in capsys.readouterr().out


def test_another_target_is_no_match(tmp_path: Path) -> None:
    sweep(tmp_path, {"nll": 0.1})
    sweep(tmp_path, {"kl_rev": 0.1}, target=0.25)
    assert verdicts(comparison(tmp_path))["kl_rev"] == "no verdict (another T*)"
    assert any("0.25 and 0.3: to compare them, give all the same in nats, such as match.at=0.25" in line
               for line in notes(comparison(tmp_path)))  # fmt: skip
    assert not any("several T*" in line for line in notes(comparison(tmp_path / "nll-0")))


def test_what_was_not_measured_tells_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05}, target=None)
    assert verdicts(comparison(tmp_path))["kl_rev"] == "not matched"
    assert main([str(tmp_path), str(tmp_path)]) == 0
    assert "python -m steer_heal.main reg=kl_rev seed=0 match=gate match.at=0.3" in capsys.readouterr().out


def test_each_row_meets_the_control_of_its_own_settings(tmp_path: Path) -> None:
    """nll at two ranks: rows of a rank are compared with nll at that rank; a label chooses one for all."""
    for rank, plus in (("lora=r4", 0.0), ("lora=r64", 0.1)):
        for reg, damage in (("nll", 0.1), ("kl_rev", 0.05)):
            for seed in range(5):
                name = f"{reg}-{rank}-{seed}"
                finished(tmp_path / name, reg, seed, damage + plus, overrides=[rank], noise=0.0005)
    found = comparison(tmp_path)
    assert verdicts(found) == {
        "nll lora=r4": "control", "nll lora=r64": "control", "kl_rev lora=r4": "better", "kl_rev lora=r64": "better",
    }  # fmt: skip
    one = comparison(tmp_path, against="nll lora=r4")
    assert verdicts(one)["nll lora=r64"] == "worse"
    assert verdicts(one)["kl_rev lora=r64"] == "worse"


def test_a_default_that_is_not_written_is_a_setting_too(tmp_path: Path) -> None:
    """A sweep at the default rank beside one at r64: each row meets nll at its own rank."""
    for overrides, plus in (([], 0.0), (["lora=r64"], 0.1)):
        for reg, damage in (("nll", 0.1), ("kl_rev", 0.05)):
            for seed in range(5):
                finished(tmp_path / f"{reg}{overrides}{seed}", reg, seed, damage + plus, overrides=overrides)
    found = comparison(tmp_path)
    assert verdicts(found) == {
        "nll": "control", "nll lora=r64": "control", "kl_rev": "better", "kl_rev lora=r64": "better",
    }  # fmt: skip
    assert found.compared == 2


def test_a_falsifier_is_compared_with_the_sweeps_control(tmp_path: Path) -> None:
    """It is nll itself, and differs from the control in more than the regulariser."""
    sweep(tmp_path / "sweep", {"nll": 0.1, "kl_rev": 0.05}, overrides=["lam=0.5"], rest=["sweep"])
    for seed in range(5):
        finished(tmp_path / f"f{seed}", "nll", seed, 0.2, overrides=["experiment=distil_prompt"], teacher="prompt",
                 steered=2.0)  # fmt: skip
    found = comparison(tmp_path)
    assert verdicts(found) == {
        "kl_rev lam=0.5": "better", "nll lam=0.5": "control", "nll experiment=distil_prompt": "worse",
    }  # fmt: skip
    console = Console(width=160, highlight=False)
    with console.capture() as captured:
        console.print(rendered(found, console))
    heads = {line[:18].strip(): line.split() for line in captured.get().splitlines()}
    assert "+0.72" in heads["steered"], "the steered model of the sweep alone"
    assert "+1.20" in heads["persona as prompt"]


def test_a_day_of_sweeps_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reg, damage in (("s1", "nll", 0.1), ("s2", "kl_rev", 0.05)):
        sweep(tmp_path / name, {reg: damage})
        cells = [{"folder": f"{reg}-{seed}"} for seed in range(5)]
        (tmp_path / name / "sweep.json").write_text(json.dumps({"cells": cells}))
    assert main([str(tmp_path)]) == 0
    assert re.search(r"^kl_rev +5 .* better", capsys.readouterr().out, re.MULTILINE)


def test_the_same_cell_twice_counts_once(tmp_path: Path) -> None:
    """Equal figures are silent; other figures of the same settings and seed are left out, and said to be."""
    sweep(tmp_path / "a", {"nll": 0.1, "kl_rev": 0.05})
    sweep(tmp_path / "b", {"nll": 0.1})
    found = comparison(tmp_path)
    assert (found.left_out, [line.row.n for line in found.lines]) == (0, [5, 5])
    sweep(tmp_path / "c", {"kl_rev": 0.2})
    found = comparison(tmp_path)
    assert found.left_out == 5
    assert any("left out: 5 runs with the settings and the seed of an earlier one" in line for line in notes(found))


def test_seeds_without_a_partner_are_told(tmp_path: Path) -> None:
    sweep(tmp_path / "a", {"nll": 0.1}, seeds=6)
    sweep(tmp_path / "b", {"kl_rev": 0.05}, seeds=8)
    assert verdicts(comparison(tmp_path))["kl_rev"] == "better (of 6 seeds)"


@pytest.mark.parametrize("spoilt", ["gone", "cut", "lacking"])
def test_items_that_are_missing_are_named_for_what_they_are(tmp_path: Path, spoilt: str) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    path = tmp_path / "kl_rev-2/items/round-0-matched/damage.jsonl"
    text = path.read_text()
    if spoilt == "gone":
        path.unlink()
    else:
        path.write_text(text[:-20] if spoilt == "cut" else text.replace("text_nll_t", "other"))
    told = {"gone": "no verdict (items are missing)", "cut": "no verdict (items are missing)", "lacking": "better"}
    assert verdicts(comparison(tmp_path))["kl_rev"] == told[spoilt], "damage_t is not needed for a verdict"


def test_what_cannot_be_read_below_a_folder_is_left_out(tmp_path: Path, warnings: list[str]) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    (tmp_path / "nll-4" / "result.json").write_text("{")
    found = comparison(tmp_path)
    assert {line.row.label: line.row.n for line in found.lines} == {"kl_rev": 5, "nll": 4}
    assert "nll-4: its result cannot be read" in warnings[0]
    with pytest.raises(ConfigError, match="nll-4: its result cannot be read"):
        gathered([tmp_path / "nll-4"])


def test_items_are_paired_by_what_they_are(tmp_path: Path) -> None:
    """In whatever order a run wrote them."""
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    first = comparison(tmp_path).lines[0].contrast
    for path in tmp_path.glob("kl_rev-*/items/round-0-matched/*.jsonl"):
        path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    assert comparison(tmp_path).lines[0].contrast == first


def test_a_control_that_is_not_there_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    with pytest.raises(
        ConfigError, match="--against nl: no row has that label or these settings; there are kl_rev, nll"
    ):
        comparison(tmp_path, against="nl")
    assert comparison(tmp_path, against="kl_rev").lines[0].is_control


def test_equivalent_cells_are_one_row(tmp_path: Path) -> None:
    """nll at two values of lam is computed once, and does not count twice."""
    for lam in ("lam=0.1", "lam=0.3"):
        for seed in range(5):
            finished(tmp_path / f"nll-{lam}-{seed}", "nll", seed, 0.1, overrides=[lam], group="nll", rest=["all"])
            finished(tmp_path / f"kl-{lam}-{seed}", "kl_rev", seed, 0.05, overrides=[lam], rest=["all"])
    found = comparison(tmp_path)
    assert {line.row.label: line.row.n for line in found.lines} == {"nll": 5, "kl_rev lam=0.1": 5, "kl_rev lam=0.3": 5}
    assert verdicts(found)["kl_rev lam=0.3"] == "better"


def test_by_averages_over_the_other_settings(tmp_path: Path) -> None:
    """A seed counts once, however many of its runs are averaged: 3 seeds have no verdict."""
    for reg, damage in (("nll", 0.1), ("kl_rev", 0.05)):
        for trait, plus in (("contexts=a", 0.0), ("contexts=b", 0.01)):
            for seed in range(3):
                finished(tmp_path / f"{reg}-{trait}-{seed}", reg, seed, damage + plus, overrides=[trait])
    found = comparison(tmp_path, by=("reg",))
    assert {line.row.label: line.row.n for line in found.lines} == {"kl_rev": 3, "nll": 3}
    assert [line.at_target.value for line in found.lines if line.at_target] == pytest.approx([0.055, 0.105], abs=0.003)
    assert verdicts(found)["kl_rev"] == "no verdict (3 seeds)"
    with pytest.raises(ConfigError, match="--by lama: no run was given it; there are contexts, reg, seed"):
        comparison(tmp_path, by=("lama",))


def test_without_a_control_there_are_figures_and_no_verdicts(tmp_path: Path) -> None:
    found = comparison(sweep(tmp_path, {"kl_fwd": 0.1, "kl_rev": 0.05}))
    assert found.control == ""
    assert [line.verdict for line in found.lines] == [None, None]
