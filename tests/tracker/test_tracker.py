"""The tracker with the real wandb client, offline and against a server on the loopback that can be broken."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tracked import ENDS_S, HEAL_ROWS, begin, picture, read, wandb_option
from helpers.tracked import alone as alone
from helpers.tracked import server as server
from helpers.wandb_offline import offline_runs
from helpers.wandb_stub import WandbStub
from pydantic import ValidationError

from steer_heal.tracker.jsonl import JsonlConfig
from steer_heal.tracker.wandb import redact

pytestmark = pytest.mark.slow(20)


def test_importing_the_module_does_not_import_wandb() -> None:
    code = "import sys, steer_heal.tracker.wandb; sys.exit('wandb' in sys.modules)"
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
    assert run.step_metrics == {
        "heal/*": "heal/step", "round/*": "round/index", "dose/*": "dose/trial", "vector/*": "vector/layer",
    }  # fmt: skip
    assert run.hidden == {"heal/step", "round/index", "dose/trial", "vector/layer"}
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
