"""One option of every kind from a folder: two files each, and they run, log and show with no edit elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import forked, result, rows
from helpers.own_options import finished, page, put
from matplotlib.axes import Axes
from rich.console import Console

from steer_heal.config.plugins import GROUPS
from steer_heal.report.plots import curves
from steer_heal.report.run_folder import read, read_items
from steer_heal.report.table import legend, table

pytestmark = pytest.mark.slow(20)

OPTIONS = {
    "reg/capped.py": '''
"""lam * D, at most `cap` nats."""
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from steer_heal.artifacts import Row
from steer_heal.reg import sentence
from steer_heal.reg.kl_rev import KlRev


class Capped(KlRev):
    name: Literal["capped"]
    cap: float

    def penalty(self, d: Tensor) -> Tensor:
        return (self.lam * d).clamp(max=self.cap)

    def metrics(self) -> Row:
        return super().metrics() | {"cap": self.cap}

    def expectation(self) -> str:
        return "nobody pays more than the cap"

    def diagnose(self, curve: Sequence[Row], summary: Row) -> list[str]:
        return [sentence(all(row["loss"] - row["nll"] <= self.cap + 1e-6 for row in curve), "capped throughout")]
''',
    "reg/capped.yaml": "_target_: steer_heal.reg.capped.Capped\nname: capped\nlam: 3.0\ntau: 0.0\ncap: 0.01\n",
    "filter/even.py": '''
"""Completions with an even number of tokens."""
from typing import Literal

from steer_heal.filter import Filter, FilterInput


class Even(Filter):
    name: Literal["even"]

    def score(self, item: FilterInput) -> float:
        return float(len(item.completion.ids) % 2)

    def passes(self, score: float) -> bool:
        return score == 0
''',
    "filter/even.yaml": "# @package filter.even\n_target_: steer_heal.filter.even.Even\nname: even\n",
    "eval/letters.py": '''
"""Letters an answer."""
from typing import ClassVar, Literal

from steer_heal.artifacts import Completions, Metrics, answer_ids
from steer_heal.eval import Column, EvalInput, Evaluation, means
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime


class Letters(Evaluation):
    columns: ClassVar = (Column("letters", "letters an answer, counted", "letters", "more", "outcome"),)
    name: Literal["letters"]

    def material(self, given: EvalInput) -> Completions:
        return given.answers

    def measure(self, subject: Subject, material: Completions, runtime: Runtime) -> Metrics:
        return means(answer_ids(material.rows), {"letters": [len(row.text) for row in material.rows]})
''',
    "eval/shared.py": '''
"""Training texts, doses and drifts, which only some models have."""
from typing import Any, ClassVar, Literal

from steer_heal.artifacts import Metrics
from steer_heal.eval import Column, EvalInput, Evaluation, Who
from steer_heal.lm.student import Subject
from steer_heal.runtime import Runtime


class Shared(Evaluation):
    columns: ClassVar = (
        Column("trained_on", "training texts", role="outcome"),
        Column("farthest", "largest drift", "nats", "less", "damage"),
    )
    models: ClassVar[tuple[Who, ...]] = ("healed",)
    name: Literal["shared"]

    def material(self, given: EvalInput) -> Any:
        return [len(given.train.kept()), float(given.drift.of("kl_rev").max())]

    def measure(self, subject: Subject, material: Any, runtime: Runtime) -> Metrics:
        return Metrics({"trained_on": float(material[0]), "farthest": material[1]})
''',
    "eval/shared.yaml": "# @package eval.shared\n_target_: steer_heal.eval.shared.Shared\nname: shared\n",
    "eval/letters.yaml": "# @package eval.letters\n_target_: steer_heal.eval.letters.Letters\nname: letters\n",
    "dose/ladder.py": '''
"""Doses 1, 1/2, 1/3 and so on."""
from typing import Literal

from steer_heal.dose import Dose, DoseSearch, Trials


class Ladder(Dose):
    name: Literal["ladder"]
    rungs: int

    def count(self) -> int:
        return self.rungs

    def find(self, trials: Trials) -> DoseSearch:
        return DoseSearch(tuple(1 / (k + 1) for k in range(self.rungs)))
''',
    "dose/ladder.yaml": "_target_: steer_heal.dose.ladder.Ladder\nname: ladder\nrungs: 3\n",
    "model/other.py": '''
"""The tiny model from other random weights."""
from typing import Literal

from steer_heal.model.tiny import Tiny


class Other(Tiny):
    name: Literal["other"]
''',
    "model/other.yaml": """\
_target_: steer_heal.model.other.Other
name: other
dtype: float32
device: cpu
attn_implementation: sdpa
note: made up for a test
init_seed: 5
""",
    "match/half.py": '''
"""Each student at half of what it has gained itself."""
from typing import Literal

from steer_heal.match import Frontier, Gates
from steer_heal.match.gate import SolveGate


class Half(SolveGate):
    name: Literal["half"]

    def find(self, gates: Gates, target: float) -> Frontier:
        return super().find(gates, gates.gain(1.0) / 2)
''',
    "match/half.yaml": """\
_target_: steer_heal.match.half.Half
name: half
at: 1.0
gates: [0.5]
tolerance: 1.0e-4
trials: 9
""",
    "tracker/counting.py": '''
"""metrics.jsonl, and the number of its rows."""
from pathlib import Path
from typing import Any, Literal

from steer_heal.tracker import Tracker, TrackerConfig


class Counting(Tracker):
    count = 0

    def log(self, row: Any) -> None:
        super().log(row)
        self.count += 1
        (self.run_dir / "count.txt").write_text(str(self.count))


class CountingConfig(TrackerConfig):
    name: Literal["counting"]

    def open(self, run_dir: Path, *, config: dict[str, Any], group: str | None, run_name: str) -> Tracker:
        return Counting(run_dir)
''',
    "tracker/counting.yaml": "_target_: steer_heal.tracker.counting.CountingConfig\nname: counting\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an option of every kind."""
    root = tmp_path_factory.mktemp("every-kind")
    named = [f"{name}{end}" for name in ("steer/keep_norm", "eval/questions") for end in (".py", ".yaml")]
    own = {name: page()[f"mine/{name}"] for name in named}
    put(root / "mine", OPTIONS | own)
    said = forked(
        root, "-cd", "mine", "experiment=tiny", "reg=capped", "filter=[perplexity,length,even]",
        "eval=[trait,damage,text,drift,letters,shared,questions]", "dose=ladder", "steer=keep_norm", "model=other",
        "tracker=counting", "match=half", "heal.epochs=1",
    )  # fmt: skip
    return finished(root, said, "capped").folder


def test_every_kind_is_there() -> None:
    """Reference: the groups whose options are code."""
    assert {name.partition("/")[0] for name in OPTIONS} | {"steer"} == set(GROUPS)


def test_a_regulariser_says_what_it_logs_and_expects(folder: Path) -> None:
    heal = [row for row in rows(folder) if "heal/step" in row]
    paid = [row["heal/loss"] - row["heal/nll"] for row in heal]
    assert max(paid) == pytest.approx(0.01, abs=1e-5), "the cap was never reached"
    assert result(folder)["rounds"][0]["cap"] == 0.01
    log = (folder / "log.txt").read_text()
    assert "expect that nobody pays more than the cap" in log
    assert "ok: capped throughout" in log
    assert "barrier on for" not in log, "what its base class would say"


def test_an_evaluation_reaches_every_record(folder: Path) -> None:
    (row,) = [row for row in rows(folder) if "round/index" in row]
    record = result(folder)
    for who in ("base", "steered", "healed"):
        texts = [answer["text"] for answer in record["answers"][who]]
        expected = sum(map(len, texts)) / len(texts)
        assert row[f"round/{who}/letters"] == record["rounds"][0][f"{who}/letters"] == pytest.approx(expected)
        items = read_items(folder, who, "letters")
        assert [item["letters"] for item in items.values()] == list(map(len, texts)), f"the items of {who}"
    assert read_items(folder, "healed", "letters").keys() == items.keys(), "the same prompts have other ids"
    asked = [answer["text"].count("?") for answer in record["answers"]["healed"]]
    assert row["round/healed/questions"] == pytest.approx(sum(asked) / len(asked)), "the example of the page"
    assert row["round/healed/trained_on"] == row["round/kept"]
    assert row["round/healed/farthest"] == pytest.approx(row["round/healed/kl_rev_max"])
    assert not {key for key in row if key.startswith(("round/base/trained", "round/steered/trained"))}


def test_an_evaluation_reaches_the_table_and_the_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: its own words, unit and aim; `compare` reads them from the run and needs none of the code."""
    (run,) = read(folder)
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table([run]))
    for name in ("letters", "trained_on", "farthest"):
        assert name in captured.get(), captured.get()
        assert name in legend([run])
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set", lambda ax, **given: titles.append(f"{given.get('title')} | {given.get('ylabel')}"))
    curves([run], ["own"], folder / "again.png")
    assert "letters | letters, more is better" in titles, titles
    assert "farthest | nats, less is better" in titles, titles


def test_a_dose_a_filter_and_an_operation_act(folder: Path) -> None:
    store = folder.parents[1] / "store"
    filtered = [json.loads(line) for path in store.glob("filter.sift/*/*.jsonl") for line in path.open()]
    validated_at = result(folder)["rounds"][0]["dose"]  # held-out answers are filtered too
    assert {row["dose"] for row in filtered} == {1.0, 1 / 2, 1 / 3, validated_at}
    assert all(("even" in row["reasons"]) == (len(row["ids"]) % 2 == 1) for row in filtered)
    (vector,) = store.glob("steer.extract/*/vector.json")
    assert json.loads(vector.read_text())["how"] == "turn"


def test_a_match_acts(folder: Path) -> None:
    row = result(folder)["rounds"][0]
    assert row["matched/target"] == pytest.approx(row["healed/trait_gain"] / 2)
    gain = row["healed/trait_gain"]
    if gain > 0:
        assert abs(row["matched/trait_gain"] - gain / 2) < 1e-3
    else:
        assert row["matched/reached"] == 0


def test_a_tracker_and_a_model_act(folder: Path) -> None:
    assert int((folder / "count.txt").read_text()) == len(rows(folder))
    assert result(folder)["note"] == "made up for a test (float32)"
