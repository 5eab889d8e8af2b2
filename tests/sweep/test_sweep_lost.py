"""Sweeps of which something was deleted: what is told of it, and cells made again as they were composed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.command import forked, result
from omegaconf import OmegaConf

from steer_heal.sweep import Sweep, archive
from steer_heal.sweep.cell import PARTS, _yaml, load_cell
from steer_heal.sweep.status import Status, read, write

pytestmark = pytest.mark.slow(40)

QUICK = ("-m", "experiment=tiny", "heal.steps=4", "tracker=jsonl", "reg=nll,wd", "lam=0.1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of two cells."""
    root = tmp_path_factory.mktemp("lost")
    said = forked(root, *QUICK, "hydra.sweep.dir=here", f"runtime.store={root}/store")
    assert said.returncode == 0, said.stderr
    return root / "here"


@pytest.fixture
def sweep(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, whose cells are made and run there."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)
    for path in folder.glob("*/.hydra/hydra.yaml"):
        path.write_text(path.read_text().replace(str(finished), str(folder)))
    (folder / archive.NAME).unlink()
    archive.keep(folder, ["0-nll", "1-wd"])
    return folder


def asked(folder: Path, command: str, module: str = "sweep") -> subprocess.CompletedProcess[str]:
    said = forked(folder.parent, *command.split(), module=module)
    assert "Traceback" not in said.stderr, said.stderr
    return said


@pytest.mark.parametrize(("command", "module"), [("status here", "sweep"), ("here", "compare"), ("wait here", "sweep")])
def test_a_deleted_cell_is_named_by_what_differs_in_it(sweep: Path, command: str, module: str) -> None:
    shutil.rmtree(sweep / "1-wd")
    said = asked(sweep, command, module)
    told = said.stdout + said.stderr
    assert "  reg=wd (1-wd)  missing      its folder is missing; resubmit makes it again" in told, told
    assert "1 of 2 cells has no result" in told
    assert told.rstrip().endswith("python -m steer_heal.sweep resubmit here"), told
    assert ("\nnll" in told) == (command != "status here"), "the table of the others"


@pytest.mark.parametrize("launcher", ["local", "parallel"])
def test_a_deleted_cell_is_made_again_as_it_was(sweep: Path, launcher: str) -> None:
    """Reference: its files before. Nothing is composed again, so conf/ may have changed since."""
    before = {part: (sweep / "1-wd" / part).read_bytes() for part in PARTS}
    figures = result(sweep / "1-wd")["rounds"]
    record = json.loads((sweep / "sweep.json").read_text())
    if launcher == "parallel":
        record["launcher"] = {"_target_": "steer_heal.sweep.parallel.Parallel", "name": "parallel", "jobs": 1,
                              "memory_gb": "auto"}  # fmt: skip
        (sweep / "sweep.json").write_text(json.dumps(record))
    shutil.rmtree(sweep / "1-wd")
    said = asked(sweep, "resubmit here")
    assert said.returncode == 0, said.stderr
    assert {part: (sweep / "1-wd" / part).read_bytes() for part in PARTS} == before
    assert "reg=wd (1-wd): made again as the sweep began it" in said.stderr
    again = result(sweep / "1-wd")["rounds"]
    assert [{k: v for k, v in row.items() if k != "heal_seconds"} for row in again] == [
        {k: v for k, v in row.items() if k != "heal_seconds"} for row in figures
    ]
    assert read(sweep / "0-nll").attempt == 1, "the other was run again"


def test_a_sweep_of_an_earlier_version_says_how_to_run_the_cell(sweep: Path) -> None:
    """It kept no copy; a command runs the cell in the same folder, where the table finds it."""
    (sweep / archive.NAME).unlink()
    shutil.rmtree(sweep / "1-wd")
    said = asked(sweep, "resubmit here")
    assert said.returncode == 1
    (line,) = [line for line in said.stderr.splitlines() if "there is no copy" in line]
    assert "reg=wd (1-wd): its folder is missing" in line
    command = line.partition("with the conf/ of today: python -m steer_heal.main ")[2].split()
    assert "sweep resubmit" not in asked(sweep, "status here").stdout, "it would fail"
    assert forked(sweep.parent, *command).returncode == 0
    assert "2 finished" in asked(sweep, "status here").stdout


def test_a_folder_without_its_configuration(sweep: Path) -> None:
    """With a result it is finished; without one the configuration comes back."""
    for cell in ("0-nll", "1-wd"):
        shutil.rmtree(sweep / cell / ".hydra")
    assert asked(sweep, "status here").returncode == 0
    (sweep / "1-wd/result.json").unlink()
    write(sweep / "1-wd", Status(state="failed", attempt=1))
    assert asked(sweep, "resubmit here").returncode == 0
    assert load_cell(sweep / "1-wd").reg.name == "wd"
    assert not (sweep / "0-nll/.hydra").exists()


@pytest.mark.parametrize("content", [None, b"", b"{half"], ids=["missing", "empty", "cut"])
def test_a_result_counts_whatever_became_of_the_status(sweep: Path, content: bytes | None) -> None:
    for cell in ("0-nll", "1-wd"):
        (sweep / cell / "status.json").unlink()
        if content is not None:
            (sweep / cell / "status.json").write_bytes(content)
    said = asked(sweep, "status here")
    assert (said.returncode, "2 finished" in said.stdout) == (0, True), said.stdout


def test_a_table_of_what_can_be_read(sweep: Path) -> None:
    """One cell without its curve, another with half a result."""
    (sweep / "0-nll/metrics.jsonl").unlink()
    (sweep / "1-wd/result.json").write_text('{"overrides": [')
    said = asked(sweep, "here", "compare")
    assert said.returncode == 0
    assert "\nnll" in said.stdout
    assert "here/1-wd: its result cannot be read" in said.stderr, said.stderr
    said = asked(sweep, "here/1-wd", "compare")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)


def test_a_running_sweep_survives_a_deleted_cell(sweep: Path) -> None:
    """Its folder is gone between the check and its turn."""
    opened = Sweep.open(sweep)
    shutil.rmtree(sweep / "1-wd")
    from steer_heal.sweep.launcher import give_up

    give_up(opened, ["1-wd"])
    assert read(sweep / "1-wd").state == "missing"


def test_every_batch_and_every_sweep_of_a_folder_has_its_copies(tmp_path: Path) -> None:
    from steer_heal.sweep import Entry

    for name in ("a", "b"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        for part in PARTS:
            (tmp_path / name / part).write_text(name)
    opened = Sweep.create(tmp_path, [Entry(folder="a", overrides=())], {})
    opened.add([Entry(folder="b", overrides=())])
    assert archive.held(tmp_path) == {"a", "b"}
    Sweep.create(tmp_path, [Entry(folder="a", overrides=())], {})
    assert archive.held(tmp_path) == {"a"}
    assert (tmp_path / "cells.1.zip").is_file(), "what the earlier sweep kept is lost"


def test_a_damaged_archive_is_like_none(tmp_path: Path) -> None:
    (tmp_path / archive.NAME).write_bytes(b"PK half")
    assert archive.held(tmp_path) == set()
    assert archive.restore(tmp_path, "a") == list(PARTS)


def test_a_cell_is_written_as_omegaconf_writes_it(finished: Path) -> None:
    """Reference: OmegaConf.to_yaml, which takes ten times as long."""
    config = load_cell(finished / "0-nll")
    part = OmegaConf.create({"a": ["1e3", "on", "007", "ünï", "two\nlines", "${seed}", 1e-5, None, True]})
    for one in (config.contexts, config.trait, config.hydra, part):
        assert OmegaConf.create(_yaml(OmegaConf.to_container(one, enum_to_str=True))) == OmegaConf.create(
            OmegaConf.to_yaml(one)
        )


def test_a_finished_cell_whose_result_is_gone_is_run_again(sweep: Path) -> None:
    """Its status alone would say that it had finished."""
    cell = Sweep.open(sweep).cells[0]
    (sweep / cell / "result.json").unlink()
    said = asked(sweep, "status here")
    assert said.returncode == 1
    assert "its result.json is missing" in said.stdout
    assert asked(sweep, "resubmit here").returncode == 0
    assert (sweep / cell / "result.json").is_file()
