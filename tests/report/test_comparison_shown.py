"""A comparison as a table, as numbers, as frames and explained, and the command that prints them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from helpers.finished import finished, sweep
from rich.console import Console

from steer_heal.compare import main
from steer_heal.config import ConfigError
from steer_heal.report import frames
from steer_heal.report.comparison import compared
from steer_heal.report.comparison_table import as_csv, as_json, notes, rendered
from steer_heal.report.replicates import gathered


def test_json_and_csv_hold_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    assert main([str(tmp_path), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    first, control = told["rows"]
    assert (first["row"], first["seeds"], first["verdict"]) == ("kl_rev", 5, "better")
    assert first["contrast_low"] < first["contrast"] < first["contrast_high"] < 0
    assert control["contrast"] is None
    assert len(first["runs"]) == 5
    assert main([str(tmp_path), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(rows[0]["contrast"]) == first["contrast"]
    assert rows[1]["contrast"] == ""
    assert as_json([]) == "[]"
    assert as_csv([]) == "comparison\n"


def test_frames_hold_the_same_rows(tmp_path: Path) -> None:
    sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})
    frame = frames.comparison(tmp_path)
    assert list(frame["row"]) == ["kl_rev", "nll"]
    assert frame["contrast"][0] == pytest.approx(-0.05, abs=0.003)
    whole = frames.rounds(tmp_path)
    assert whole.groupby("reg")["round/matched/gate"].count().to_dict() == {"kl_rev": 5, "nll": 5}
    points = frames.frontiers(tmp_path)
    assert sorted(points[(points["reg"] == "nll") & (points["seed"] == "0")]["at/gate"]) == [0.25, 0.5, 0.5, 0.75, 1.0]


def test_a_figure_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "one", "nll", 0, 0.1)
    record = json.loads((folder / "result.json").read_text())
    record["used"] = {
        "aa": "eval.evaluate: base, damage", "bb": "eval.evaluate: round 0, healed, damage",
        "cc": "eval.evaluate: round 0, gate 0.513, damage", "dd": "eval.evaluate: round 0, gate 0.513, trait",
        "ee": "heal.heal: round 0", "ff": "eval.evaluate: round 0, steered, damage",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(record))
    assert main([str(tmp_path), "--explain", "nll", "damage"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "  python -m steer_heal.main reg=nll seed=0"
    assert [line.split()[0] for line in said[2:]] == ["aa", "bb"]
    assert main([str(tmp_path), "--explain", "nll", "verdict"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["aa", "cc", "dd"]
    for given, told in (
        (("kl", "damage"), "no such row; there are nll"),
        (("nll", "x"), "must be one of trait, damage"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--explain", *given])
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("width", [160, 120, 100, 60, 40])
def test_the_table_fits_any_terminal(tmp_path: Path, width: int) -> None:
    (found,) = compared(gathered([sweep(tmp_path, {"nll": 0.1, "kl_rev": 0.05})]))
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(rendered(found, console))
    text = captured.get()
    assert all(len(line.rstrip()) <= width for line in text.splitlines()), text
    for word in ("kl_rev", "better", "control", "base", "steered", "-0.05"):
        assert word in text, f"{word} is lost at {width} columns:\n{text}"
    assert "…" not in text
    assert any("T*: 0.3 nats/token" in line for line in notes(found))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: FOLDER; usage: python -m steer_heal.compare"),
        (["--jason", "."], "unrecognized arguments: --jason; usage"),
        (["--json", "--csv", "."], "argument --csv: not allowed with argument --json; usage"),
        (["nowhere"], "nowhere: there is no such folder; give the folder of a run or of a sweep"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_folder_without_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="empty: neither a run nor a sweep, nor a folder of these"):
        gathered([tmp_path / "empty"])
