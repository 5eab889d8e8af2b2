"""Launchers: the fields that each takes, the cells that it starts, and the errors before anything is made."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command import forked, result, run
from helpers.faults import frozen
from omegaconf import OmegaConf

from steer_heal.config import CONF, ConfigError, build
from steer_heal.sweep import Entry, Sweep, parallel
from steer_heal.sweep.launcher import Launcher
from steer_heal.sweep.parallel import Parallel
from steer_heal.sweep.status import read

pytestmark = [pytest.mark.slow(45), pytest.mark.long]

FILES = sorted((CONF / "hydra/launcher").glob("*.yaml"))
PLUGINS: Any = importlib.import_module("hydra_plugins.steer_heal_plugins.launchers")
TWO = ("-m", "experiment=tiny", "heal.steps=4", "reg=nll,wd")
REFUSED = [
    ("local", "jobs=2", "hydra.launcher.jobs=2: there is no such field; there are name"),
    (
        "parallel",
        "jobs=0",
        "hydra.launcher.jobs=0 is not allowed: must be greater than or equal to 1 or must be 'auto'",
    ),
    ("parallel", "jobs=many", "hydra.launcher.jobs='many' is not allowed: must be a valid integer or must be 'auto'"),
    (
        "parallel",
        "memory_gb=-1",
        "hydra.launcher.memory_gb=-1 is not allowed: must be greater than 0 or must be 'auto'",
    ),
    ("slurm", "timeout_min=0", "hydra.launcher.timeout_min=0 is not allowed: must be greater than or equal to 1"),
    ("slurm", "signal_delay_s=14400", "hydra.launcher is not allowed: must be one with signal_delay_s under 60"),
    ("slurm", "setup=module", "hydra.launcher.setup='module' is not allowed: must be a list"),
]


def launcher(name: str, **fields: Any) -> Launcher:
    """The option that a file describes, with fields set."""
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"hydra/launcher/{name}.yaml"), resolve=True)
    plugin = getattr(PLUGINS, content.pop("_target_").rpartition(".")[2])
    found = build({"_target_": plugin.option, **content, **fields}, "hydra.launcher")
    assert isinstance(found, Launcher)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_launcher_builds_and_its_file_says_all_that_can_be_set(file: Path) -> None:
    option = launcher(file.stem)
    assert option.name == file.stem
    assert type(option).__module__ == f"steer_heal.sweep.{file.stem}", "one option, one file"
    given = yaml.safe_load(file.read_text(encoding="utf-8")).keys() - {"_target_"}
    assert given == set(type(option).model_fields), "the file and the class differ in their fields"
    assert build(option.recorded(), "hydra.launcher") == option, "what sweep.json keeps builds another one"


def test_launchers_are_these() -> None:
    assert [file.stem for file in FILES] == ["local", "parallel", "slurm"]


@pytest.mark.parametrize(("name", "field", "line"), REFUSED, ids=[f"{n} {f}" for n, f, _ in REFUSED])
def test_a_bad_field_is_one_line(name: str, field: str, line: str) -> None:
    key, _, value = field.partition("=")
    with pytest.raises(ConfigError) as refused:
        launcher(name, **{key: yaml.safe_load(value)})
    assert str(refused.value).startswith(line)


def test_what_a_cluster_always_wants_can_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"TIMEOUT_MIN": "90", "CPUS_PER_TASK": "8", "MEM_GB": "64", "GPUS_PER_NODE": "a100:2",
            "ARRAY_PARALLELISM": "7", "SETUP": '["module load cuda/12.8", "export A=b"]'}  # fmt: skip
    for name, value in ours.items():
        monkeypatch.setenv(f"STEER_HEAL_SLURM_{name}", value)
    for name in ("PARTITION", "ACCOUNT", "QOS", "CONSTRAINT"):
        monkeypatch.setenv(f"SBATCH_{name}", name.lower())
    found = launcher("slurm").model_dump()
    assert [found[name.lower()] for name in ours] == [
        90, 8, 64.0, "a100:2", 7, ("module load cuda/12.8", "export A=b")
    ]  # fmt: skip
    assert [found[name] for name in ("partition", "account", "qos", "constraint")] == [
        "partition", "account", "qos", "constraint"
    ]  # fmt: skip


def test_nothing_is_made_where_there_is_no_slurm(tmp_path: Path) -> None:
    nowhere = str(Path(sys.executable).parent)
    said = forked(tmp_path, *TWO, "hydra/launcher=slurm", PATH=nowhere)
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()
    assert line.startswith("steer_heal: hydra/launcher=slurm: this machine has no sbatch, srun, squeue, scancel;"), line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("hydra/launcher=slurm", "hydra.launcher.detatch=true"), "no such knob. Did you mean detach?"),
        (("hydra.launcher.detach=true",), "only some options of hydra/launcher have such a knob: slurm; choose among"),
        (("hydra.launcher.zzz=1",), "no such knob. There are account, additional_parameters, array_parallelism"),
    ],
)  # fmt: skip
def test_a_slip_in_a_launchers_field(tmp_path: Path, given: tuple[str, ...], reason: str) -> None:
    said = forked(tmp_path, *TWO, *given)
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()
    assert reason in line, line


def test_two_cells_need_two_folders(tmp_path: Path) -> None:
    said = forked(tmp_path, *TWO, "hydra.sweep.subdir=same")
    assert said.returncode == 2
    assert "hydra.sweep.subdir='same' is the folder of two cells" in said.stderr.splitlines()[-1]
    assert "Traceback" not in said.stderr


def test_a_parallel_sweep_finds_what_a_local_one_does(tmp_path: Path) -> None:
    """The same cell with a store of its own, on as many threads."""
    for name in ("local", "parallel"):
        said = run(tmp_path, *TWO, f"hydra/launcher={name}", f"hydra.sweep.dir={tmp_path / name}",
                   f"runtime.store={tmp_path}/{name}-store")  # fmt: skip
        assert said.returncode == 0, said.stderr
    for cell in ("0-nll", "1-wd"):
        one, two = (result(tmp_path / name / cell)["rounds"][0] for name in ("local", "parallel"))
        assert one.keys() == two.keys()
        other = {key for key in one if one[key] != two[key] and key != "heal_seconds"}
        assert not other, f"{cell} differs in {other}"
        assert read(tmp_path / "parallel" / cell).state == "finished"
    owners = {read(tmp_path / "parallel" / cell).owner["pid"] for cell in ("0-nll", "1-wd")}
    assert len(owners) == 2, "a process each"


class FakeWorker:
    """A process that takes no time, and the arguments it was started with."""

    begun: list[dict[str, Any]]

    def __init__(self, sweep: Sweep, cell: str, place: int, threads: int, gpu: str | None) -> None:
        self.place, self.process = place, subprocess.Popen([sys.executable, "-c", ""])
        FakeWorker.begun.append({"cell": cell, "threads": threads, "gpu": gpu})

    def end(self) -> None:
        self.process.wait()


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run cells on a machine with given cores, GPUs and GB; return what each was started with."""
    FakeWorker.begun = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def ran(cells: int, cores: int, gpus: int = 0, free: float = 1000.0, **fields: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(parallel, "_Worker", FakeWorker)
        monkeypatch.setattr(parallel, "cores", lambda: cores)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(parallel, "available", lambda device: int(free * 1e9))
        monkeypatch.setattr(Parallel, "need", lambda self, sweep, cell, on_gpu: 0.1)
        monkeypatch.setattr(parallel, "_model", lambda sweep, cell: {"device": "auto"})
        found = launcher("parallel", **fields)
        assert isinstance(found, Parallel)
        names = [str(i) for i in range(cells)]
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        entries = [Entry(folder=name, overrides=()) for name in names]
        found.launch(Sweep.create(tmp_path, entries, {}), names)
        return FakeWorker.begun

    return ran


def test_cores_are_divided_among_the_cells(handed_out: Any) -> None:
    assert {one["threads"] for one in handed_out(8, 8)} == {1}


@pytest.mark.parametrize(("jobs", "cells", "threads"), [(2, 6, 8), (4, 6, 4), (4, 2, 8), (3, 9, 5), (16, 40, 1)])
def test_threads_are_cores_over_jobs(handed_out: Any, jobs: int, cells: int, threads: int) -> None:
    made = handed_out(cells, 16, jobs=jobs)
    assert [one["cell"] for one in made] == [str(i) for i in range(cells)], "every cell, in order"
    assert {one["threads"] for one in made} == {threads}


@pytest.mark.parametrize(
    ("given", "jobs", "at_once", "threads"),
    [("1", "auto", 16, 1), ("4", "auto", 4, 4), ("4,2", "auto", 4, 4), ("4", 8, 8, 4), ("64", "auto", 1, 64),
     ("many", "auto", 16, 1), ("", "auto", 16, 1)],
)  # fmt: skip
def test_threads_that_the_user_has_set_stand(
    handed_out: Any, monkeypatch: pytest.MonkeyPatch, told: list[str], given: str, jobs: Any, at_once: int, threads: int
) -> None:
    """As many cells at once as have cores for them, unless their number is set too."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    made = handed_out(20, 16, jobs=jobs)
    assert {one["threads"] for one in made} == {threads}
    each = "1 thread" if threads == 1 else f"{threads} threads"
    assert told[0] == f"20 cells, {at_once} at once, {each} each"


@pytest.mark.parametrize(("given", "expected"), [("3", "3"), ("", "5")])
def test_a_cells_process_has_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    """The environment of a real process."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    (tmp_path / "a").mkdir()
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\necho $OMP_NUM_THREADS\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    worker = parallel._Worker(Sweep.create(tmp_path, [Entry(folder="a", overrides=())], {}), "a", 0, 5, None)
    assert worker.process.wait(60) == 0
    assert (tmp_path / "a/output.txt").read_text() == f"{expected}\n"


def test_each_gpu_has_one_cell_at_a_time(handed_out: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    made = handed_out(6, 16, gpus=2)
    assert {one["gpu"] for one in made} == {"3", "5"}, "those that this process may use, by their own numbers"
    assert made[0]["gpu"] != made[1]["gpu"]
    assert {one["threads"] for one in made} == {8}


def test_there_are_no_more_cells_at_once_than_cores(handed_out: Any, warnings: list[str]) -> None:
    assert {one["threads"] for one in handed_out(8, 4, jobs=100)} == {1}
    assert warnings[0] == "hydra.launcher.jobs=100: there are 4 cores"


def test_gpus_are_for_those_that_would_use_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for device, seen in (("auto", ["0", "1", "2"]), ("cuda", ["0", "1", "2"]), ("cpu", [])):
        (tmp_path / "a/.hydra").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a/.hydra/config.yaml").write_text(f"model: {{device: {device}}}")
        option = launcher("parallel")
        assert isinstance(option, Parallel)
        assert option.gpus(Sweep(tmp_path, Any), ["a"]) == seen, device  # type: ignore[arg-type]


class Resident(FakeWorker):
    """A process that runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_cell_waits_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running cells may still use the memory reserved for them; a single cell starts in any case."""
    running = Resident()
    monkeypatch.setattr(parallel, "available", lambda device: 25 * 10**9)

    def fits(gb: float, beside: Any) -> bool:
        option = launcher("parallel", memory_gb=gb)
        assert isinstance(option, Parallel)
        return option._fits(Sweep(Path(), Any), "b", beside, {"a": 10.0}, False)  # type: ignore[arg-type]

    try:
        held = parallel._resident(running.process.pid)
        assert 0 < held < 1, f"an interpreter that does nothing holds {held} GB"
        assert fits(14.0, {"a": running})
        assert not fits(16.0, {"a": running}), "10 of 25 GB are promised"
        assert fits(1000.0, {})
    finally:
        running.process.kill()
        running.process.wait()


def test_a_cells_memory_grows_with_its_model(tmp_path: Path) -> None:
    (folder,) = frozen([["reg=nll"]], tmp_path)
    auto, given = launcher("parallel"), launcher("parallel", memory_gb=7.5)
    assert isinstance(auto, Parallel)
    assert isinstance(given, Parallel)
    sweep = Sweep(tmp_path, Any)  # type: ignore[arg-type]
    assert given.need(sweep, folder.name, False) == 7.5
    small = auto.need(sweep, folder.name, False)
    assert parallel.PROCESS_GB < small < parallel.PROCESS_GB + 0.1


def test_how_a_process_ended_is_said_in_words() -> None:
    assert parallel._how(3) == "ended with status 3"
    assert parallel._how(-9) == "was killed by SIGKILL, as happens when memory runs out"
    assert parallel._how(-15) == "was killed by SIGTERM"


def test_every_launcher_says_what_it_does() -> None:
    kinds: Sequence[type] = [type(launcher(file.stem)) for file in FILES]
    for kind in kinds:
        assert inspect.getdoc(kind), kind
    assert os.cpu_count() is None or parallel.cores() <= os.cpu_count()  # type: ignore[operator]
