"""The tracker with the real wandb client, offline and against a server on the loopback that can be spoilt."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from wandb_offline import offline_runs
from wandb_stub import WandbStub

from steer_heal import tracking
from steer_heal.tracking import JsonlConfig, Tracker, TrackerConfig, WandbConfig, redact

HEAL_ROWS = [{"heal/step": step, "heal/nll": 3.0 - step / 10, "heal/kl": 0.0} for step in range(20)]
ENDS_S = 90  # far above what any test takes: it tells a hang from a slow machine


def wandb_option(**fields: Any) -> WandbConfig:
    """What conf/tracker/wandb.yaml holds, with some fields replaced."""
    held = {"name": "wandb", "project": "steer_heal", "entity": None, "mode": "auto", "tags": ()}
    return WandbConfig(**(held | fields))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B settings of the user's, no network but the loopback, no leftovers, and an end to every test."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    before = {name for name in os.environ if name.startswith("WANDB_")}

    def hung(*_: object) -> None:
        raise AssertionError(f"still not done after {ENDS_S} s")

    previous = signal.signal(signal.SIGALRM, hung)
    signal.alarm(ENDS_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert {name for name in os.environ if name.startswith("WANDB_")} - before <= {"WANDB_API_KEY", "WANDB_MODE"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """A W&B server and a key for it."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        yield stub


def begin(options: TrackerConfig, run_dir: Path, **config: Any) -> Tracker:
    return options.open(run_dir, config=config, group="sweep", run_name="reg=nll")


def read(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a run, refusing what is not strict JSON, without their times."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / name).read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all(row.pop("time") >= 0 for row in rows)
    return rows


def test_importing_the_module_does_not_import_wandb() -> None:
    code = "import sys, steer_heal.tracking; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=ENDS_S)


def test_jsonl_alone(tmp_path: Path) -> None:
    with begin(JsonlConfig(name="jsonl"), tmp_path / "run") as tracker:
        tracker.log({"heal/step": 0, "heal/nll": 2.5, "note": "naïve"})
        assert len(read(tmp_path / "run")) == 1, "each row is on disk at once"
        tracker.log({"a": float("nan"), "b": float("inf"), "c": float("-inf")})
        tracker.summary({"round/trait": 1.0})
        tracker.table("samples", ["text"], [["x"]])
        tracker.image("curve", tmp_path / "none.png")
    first, second = read(tmp_path / "run")
    assert first == {"heal/step": 0, "heal/nll": 2.5, "note": "naïve"}
    assert second == {"a": "nan", "b": "inf", "c": "-inf"}
    assert [float(value) for value in second.values()][1:] == [float("inf"), float("-inf")]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_again_keeps_the_files_before(tmp_path: Path) -> None:
    for attempt in range(3):
        with begin(JsonlConfig(name="jsonl"), tmp_path) as tracker:
            tracker.log({"attempt": attempt})
            assert tracker.attempt == attempt
    kept = [read(tmp_path, name) for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")]
    assert kept == [[{"attempt": 0}], [{"attempt": 1}], [{"attempt": 2}]]


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    class Full:
        def write(self, _: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    tracker = begin(JsonlConfig(name="jsonl"), tmp_path)
    tracker._file.close()
    tracker._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"), tracker:
        tracker.log({"heal/step": 0})


@pytest.mark.parametrize(
    "bad", [{"project": "a/b"}, {"project": ""}, {"tags": ("",)}, {"tags": ("x" * 65,)}, {"mode": "of"}]
)
def test_what_wandb_would_refuse_is_refused_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        wandb_option(**bad)


def test_redact_hides_secrets_and_only_secrets() -> None:
    hidden = ["api_key", "WANDB_API_KEY", "hf_token", "token", "authToken", "password", "client_secret", "apiKey"]
    shown = ["tokenizer", "n_tokens", "max_new_tokens", "key", "monkey", "token_ids", "secretary", "passes"]
    config = {"model": [dict.fromkeys(hidden, "s3cret")], "shown": dict.fromkeys(shown, "fine")}
    clean = redact(config, environ={})
    assert set(clean["model"][0].values()) == {"<redacted>"}
    assert clean["shown"] == config["shown"]
    assert redact({"token": -1, "use_token": True, "path": Path("a"), "layers": (1, 2), "none": None}, {}) == {
        "token": -1,
        "use_token": True,
        "path": "a",
        "layers": [1, 2],
        "none": None,
    }
    assert redact({"header": "Bearer hf_abcdefgh"}, {"HF_TOKEN": "hf_abcdefgh"}) == {"header": "<redacted>"}


def test_an_offline_run_holds_everything(tmp_path: Path, warnings: list[str]) -> None:
    """`auto` without a key: offline, in silence."""
    options = wandb_option(project="p", tags=("seed0",))
    with begin(options, tmp_path, reg={"name": "nll"}, hf_token="s3cret", lora={"r": 8}) as tracker:
        for row in HEAL_ROWS:
            tracker.log(row)
        tracker.log({"round/index": 0, "round/healed/trait": float("nan")})
        tracker.table("samples", ["text", "score"], [["x", 1.0]])
        tracker.image("curve", picture(tmp_path))
        tracker.summary({"round/trait": 1.5})
    (run,) = offline_runs(tmp_path)
    assert (run.project, run.group, run.name, run.tags) == ("p", "sweep", "reg=nll", ["seed0"])
    assert run.config["reg"] == {"name": "nll"}
    assert run.config["lora"] == {"r": 8}
    assert run.config["hf_token"] == "<redacted>"
    assert run.step_metrics == {"heal/*": "heal/step", "round/*": "round/index"}
    assert run.hidden == {"heal/step", "round/index"}
    assert [{key: row[key] for key in HEAL_ROWS[0]} for row in run.rows[: len(HEAL_ROWS)]] == HEAL_ROWS
    assert "time" not in run.rows[0]
    assert run.rows[-2]["samples/nrows"] == 1
    assert run.rows[-1]["curve/_type"] == "image-file"
    assert run.summary["round/trait"] == 1.5
    assert run.exit_code == 0
    assert read(tmp_path)[: len(HEAL_ROWS)] == HEAL_ROWS
    assert not list((tmp_path / "home").rglob("staging")), "tables are staged in the run's folder"
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.glob("wandb/*/*.wandb"))
    assert warnings == []


def test_an_exception_is_recorded_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lost"), begin(wandb_option(), tmp_path) as tracker:
        tracker.log(HEAL_ROWS[0])
        raise KeyError("lost")
    (run,) = offline_runs(tmp_path)
    assert (len(run.rows), run.exit_code) == (1, 1)


def test_jobs_of_one_process_do_not_merge(tmp_path: Path) -> None:
    for job in ("a", "b"):
        with begin(wandb_option(), tmp_path / job, job=job) as tracker:
            assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path / job))
            for row in HEAL_ROWS:
                tracker.log(row)
        assert "WANDB_DATA_DIR" not in os.environ
    (a,), (b,) = offline_runs(tmp_path / "a"), offline_runs(tmp_path / "b")
    assert a.run_id != b.run_id
    assert (a.config["job"], b.config["job"]) == ("a", "b")
    assert len(a.rows) == len(b.rows) == len(HEAL_ROWS)


def test_a_run_that_begins_again_is_another_run_to_wandb(tmp_path: Path) -> None:
    for _ in range(2):
        with begin(wandb_option(), tmp_path) as tracker:
            tracker.log(HEAL_ROWS[0])
    first, second = sorted(offline_runs(tmp_path), key=lambda run: run.name)
    assert (first.name, second.name) == ("reg=nll", "reg=nll#1")
    assert first.run_id != second.run_id
    assert len(first.run_id) == 12


def test_online(tmp_path: Path, server: WandbStub, warnings: list[str]) -> None:
    with begin(wandb_option(project="p"), tmp_path, api_key="s3cret") as tracker:
        for row in HEAL_ROWS:
            tracker.log(row)
        tracker.image("curve", picture(tmp_path))
    (run,) = server.runs.values()
    assert [{key: row[key] for key in HEAL_ROWS[0]} for row in run.rows[: len(HEAL_ROWS)]] == HEAL_ROWS
    assert run.config["api_key"] == "<redacted>"
    assert any(name.startswith("media/images/curve") for name in run.files)
    assert "wandb-metadata.json" not in run.files, "it would hold the command line"
    assert run.exit_code == 0
    assert warnings == []
    assert offline_runs(tmp_path) == []


def test_the_key_may_be_in_netrc(tmp_path: Path, server: WandbStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    Path(os.environ["NETRC"]).write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    with begin(wandb_option(), tmp_path) as tracker:
        tracker.log(HEAL_ROWS[0])
    assert len(server.runs) == 1


@pytest.mark.parametrize(("mode", "expected"), [("offline", 1), ("disabled", 0)])
def test_the_environment_decides_the_mode(
    tmp_path: Path, server: WandbStub, monkeypatch: pytest.MonkeyPatch, mode: str, expected: int
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with begin(wandb_option(mode="online"), tmp_path) as tracker:
        tracker.log(HEAL_ROWS[0])
    assert len(offline_runs(tmp_path)) == expected
    assert server.operations == []
    assert read(tmp_path) == HEAL_ROWS[:1]


@pytest.mark.parametrize(
    ("fault", "fault_on"),
    [("500", ""), ("hang", ""), ("reset", ""), ("empty", ""), ("500", "UpsertBucket"), ("hang", "UpsertBucket")],
)
def test_a_server_that_is_not_there_at_the_start(
    tmp_path: Path,
    server: WandbStub,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    fault_on: str,
) -> None:
    """Spoilt altogether (`empty` is a captive portal) or only for wandb.init: the run is offline, with one warning."""
    monkeypatch.setattr(tracking, "INIT_S", 1.0)
    server.fault, server.fault_on = fault, fault_on
    with begin(wandb_option(mode="online"), tmp_path) as tracker:
        for row in HEAL_ROWS:
            tracker.log(row)
    (run,) = offline_runs(tmp_path)
    assert (len(run.rows), run.exit_code) == (len(HEAL_ROWS), 0)
    assert read(tmp_path) == HEAL_ROWS
    assert len(warnings) == 1
    assert "online failed" in warnings[0]


@pytest.mark.parametrize("fault", ["500", "hang", "reset", "empty"])
def test_an_outage_halfway(
    tmp_path: Path, server: WandbStub, warnings: list[str], monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """`empty` makes wandb's helper process crash."""
    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    with begin(wandb_option(), tmp_path) as tracker:
        for step, row in enumerate(HEAL_ROWS):
            if step == 10:
                server.fault = fault
            tracker.log(row)
        tracker.image("curve", picture(tmp_path))
    assert read(tmp_path) == HEAL_ROWS
    assert len(warnings) == 1
    assert "finish failed" in warnings[0]


def test_a_helper_that_stops_answering(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own `log` and `finish` would then block for ever, and its atexit hook too."""
    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    monkeypatch.setattr(tracking, "GRACE_S", 3.0)
    with begin(wandb_option(mode="offline"), tmp_path) as tracker:
        assert tracker.mirror
        helper = tracker.mirror._session._connection._proc._process
        os.kill(helper.pid, signal.SIGSTOP)
        for step in range(3000):
            tracker.log({"heal/step": step, "text": "x" * 200})
    assert len(read(tmp_path)) == 3000
    assert helper.wait() == -signal.SIGKILL
    assert warnings
    with begin(wandb_option(mode="offline"), tmp_path / "next") as tracker:
        tracker.log(HEAL_ROWS[0])
    assert len(offline_runs(tmp_path / "next")) == 1, "the next job of the process is well"


def test_without_wandb_there_is_the_file(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with begin(wandb_option(), tmp_path) as tracker:
        tracker.log(HEAL_ROWS[0])
    assert read(tmp_path) == HEAL_ROWS[:1]
    assert len(warnings) == 1


def test_a_failing_log_is_reported_once(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    calls = []

    def broken(*_: object, **__: object) -> None:
        calls.append(1)
        raise AssertionError("no connection")

    with begin(wandb_option(), tmp_path) as tracker:
        monkeypatch.setattr(wandb.Run, "log", broken)
        for row in HEAL_ROWS:
            tracker.log(row)
        tracker.table("samples", ["text"], [["x"]])
    assert read(tmp_path) == HEAL_ROWS
    assert len(calls) == 1, "nothing is sent after that"
    assert len(warnings) == 1
    assert "no connection" in warnings[0]
    assert offline_runs(tmp_path)[0].exit_code == 0


def test_a_failing_picture_costs_pictures_only(tmp_path: Path, warnings: list[str]) -> None:
    with begin(wandb_option(), tmp_path) as tracker:
        tracker.image("curve", tmp_path / "none.png")
        tracker.image("curve", tmp_path / "none.png")
        tracker.table("samples", ["text"], [["x"]])
        for row in HEAL_ROWS:
            tracker.log(row)
    assert len(warnings) == 1
    assert len(offline_runs(tmp_path)[0].rows) == len(HEAL_ROWS)


def test_no_prompt_on_a_terminal(tmp_path: Path) -> None:
    """Without a key wandb.init asks for one on a terminal and waits; we say that there is none and go offline."""
    code = f"""
from pathlib import Path
from steer_heal.tracking import WandbConfig as Option
option = Option(name="wandb", project="p", entity=None, mode="online", tags=())
with option.open(Path({str(tmp_path)!r}), config={{}}, group=None, run_name="r") as tracker:
    tracker.log({{"heal/step": 0}})
"""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        said = b"".join(iter(lambda: read_terminal(ours), b""))
        assert child.wait(ENDS_S) == 0
    finally:
        child.kill()
        os.close(ours)
    assert b"no API key" in said
    assert b"Enter your choice" not in said
    assert len(offline_runs(tmp_path)) == 1


def read_terminal(ours: int) -> bytes:
    try:
        return os.read(ours, 4096)
    except OSError:  # Linux says EIO where the other end was closed
        return b""


def picture(folder: Path) -> Path:
    from PIL import Image

    path = folder / "curve.png"
    Image.new("RGB", (2, 2)).save(path)
    return path
