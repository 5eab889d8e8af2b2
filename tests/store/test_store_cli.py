"""`python -m steer_heal.store`: it shows what is stored, and deletes only what no run references."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steer_heal.artifacts import Metrics
from steer_heal.store import Store, intact
from steer_heal.store import stage as named
from steer_heal.store.__main__ import main
from steer_heal.store.keys import VERSIONS

DAY = 86400


@named("test_store_cli.measure")
def measure(x: float) -> Metrics:
    return Metrics(values={"x": x})


@named("test_store_cli.weigh")
def weigh(metrics: Metrics, unit: str) -> Metrics:
    return metrics


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two stages: three results of one, one of the other, made from the first of them."""
    made = Store(tmp_path / "outputs/store")
    first, *_ = [made(measure, float(x)) for x in range(3)]
    made(weigh, first, "kg")
    return made


def say(store: Store, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["--store", str(store.root), *arguments])
    return capsys.readouterr().out


def age(store: Store, key: str, days: float) -> Path:
    """Make a result look unused for so long."""
    (folder,) = store.root.glob(f"*/{key}")
    then = time.time() - days * DAY
    os.utime(folder / "manifest.json", (then, then))
    return folder


def test_ls_counts_and_weighs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: what the fixture made, and the files' own sizes."""
    said = say(store, capsys, "ls")
    rows = dict(re.findall(r"^(test_store_cli\.\w+) +(\d+) ", said, re.MULTILINE))
    assert rows == {"test_store_cli.measure": "3", "test_store_cli.weigh": "1"}
    listed = say(store, capsys, "ls", "test_store_cli.measure").splitlines()[1:]
    assert {line.split()[0] for line in listed} == set(store.used[:3])


def test_ls_of_an_unknown_stage_says_so(store: Store) -> None:
    with pytest.raises(SystemExit, match=r"heal\.heel: there are no results"):
        main(["--store", str(store.root), "ls", "heal.heel"])


def test_show_tells_what_a_result_was_made_of(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(store, capsys, "show", store.used[3][:8])
    assert said.splitlines()[0] == f"test_store_cli.weigh {store.used[3]}"
    assert said.splitlines()[2] == "intact"
    shown = json.loads(said[said.index("{") :])
    assert shown["inputs"] == {"metrics": store.used[0], "unit": "kg"}, "arguments by name, results by key"
    assert shown["files"]["metrics.json"]["bytes"] > 0
    for prefix, message in (("zz", "no such result"), ("", "4 results match; give a longer prefix")):
        with pytest.raises(SystemExit, match=message):
            main(["--store", str(store.root), "show", prefix])


def test_verify_names_what_is_damaged(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 while all is whole, 1 afterwards; a flipped byte and a lost manifest are both found."""
    with pytest.raises(SystemExit) as whole:
        main(["--store", str(store.root), "verify"])
    assert (whole.value.code, capsys.readouterr().out) == (0, "4 results, 0 damaged\n")
    first, second = (next(store.root.glob(f"*/{key}")) for key in store.used[:2])
    (first / "metrics.json").write_text('{"x": 7.0}')
    (second / "manifest.json").unlink()
    with pytest.raises(SystemExit) as damaged:
        main(["--store", str(store.root), "verify"])
    said = capsys.readouterr().out
    assert damaged.value.code == 1
    assert f"{first}: metrics.json does not match its checksum" in said
    assert f"{second}: it has no manifest" in said


def test_gc_deletes_nothing_unless_told(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    aside = store.root / "test_store_cli.measure/.damaged-x"
    aside.mkdir()
    assert "would delete 1 item," in say(store, capsys, "gc")
    assert aside.is_dir()
    assert "deleted 1 item," in say(store, capsys, "gc", "--delete")
    assert not aside.exists()
    assert all(intact(next(store.root.glob(f"*/{key}"))) for key in store.used), "a result went with it"


def test_gc_takes_what_no_code_asks_for(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: a stage whose version was raised has new keys from then on."""
    monkeypatch.setitem(VERSIONS, "test_store_cli.weigh", 2)
    said = say(store, capsys, "gc", "--delete")
    assert re.findall(r"test_store_cli\.(\w+)/\w+  outdated", said) == ["weigh"]
    assert not list(store.root.glob("test_store_cli.weigh/*"))
    assert len(list(store.root.glob("test_store_cli.measure/*"))) == 3


def test_gc_spares_what_a_run_stands_on_and_what_was_used_lately(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three old results a run names one; the fourth is young."""
    for key in store.used[:3]:
        age(store, key, days=30)
    run = tmp_path / "outputs/2026-01-01/run"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"used": [store.used[0]]}))
    arguments = ("gc", "--unused", "7", "--runs", str(tmp_path / "outputs"))
    assert "would delete 2 items," in say(store, capsys, *arguments)
    say(store, capsys, *arguments, "--delete")
    left = {folder.name for folder in store.root.glob("*/*")}
    assert left == {store.used[0], store.used[3]}
    again = Store(store.root)
    again(measure, 1.0)
    assert again.computed, "what was deleted is computed again"


def test_gc_wants_the_runs_before_it_calls_anything_unused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped folder would protect nothing, and so would a result.json that cannot be read."""
    runs = store.root.parent
    with pytest.raises(SystemExit) as missing:
        main(["--store", str(store.root), "gc", "--unused", "0", "--runs", "nowhere", "--delete"])
    assert missing.value.code == 2
    (runs / "run").mkdir()
    (runs / "run/result.json").write_text("{")
    with pytest.raises(SystemExit, match=r"result\.json cannot be read"):
        main(["--store", str(store.root), "gc", "--unused", "0", "--runs", str(runs), "--delete"])
    assert all(intact(next(store.root.glob(f"*/{key}"))) for key in store.used)


def test_gc_of_older_code_spares_what_newer_code_made(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkouts may share a store."""
    monkeypatch.setitem(VERSIONS, "test_store_cli.measure", 0)
    assert "would delete 0 items," in say(store, capsys, "gc")


def test_finding_a_result_makes_it_used(store: Store) -> None:
    """Else `gc --unused` would take what sweeps find every day."""
    folder = age(store, store.used[0], days=30)
    Store(store.root)(measure, 0.0)
    assert time.time() - (folder / "manifest.json").stat().st_mtime < DAY


def test_gc_leaves_work_in_progress_alone(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Scratch folders and leases of the living stay, also old ones; those of the dead go."""
    place = store.root / "test_store_cli.measure"
    old = time.time() - DAY
    lease = {"place": "another machine", "pid": 1, "started": "1", "host": "there"}
    for key, owner in (("alive", lease), ("dead", None)):
        scratch = place / f".writing-{key}-x"
        scratch.mkdir()
        os.utime(scratch, (old, old))
        if owner:
            (place / f".{key}.lease").write_text(json.dumps(owner))
    (place / ".writing-young-x").mkdir()
    say(store, capsys, "gc", "--delete")
    left = {path.name for path in place.glob(".*")}
    assert left == {".writing-alive-x", ".alive.lease", ".writing-young-x"}


def test_a_store_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "steer_heal.store", "--store", str(tmp_path / "none"), "ls"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1].endswith("there is no such folder")


def test_listing_does_not_wait_for_torch() -> None:
    """Importing torch alone would take longer than listing ten thousand results."""
    code = "import sys, steer_heal.store.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
