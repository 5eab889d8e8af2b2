"""The walk through families of models: what it records of one that agrees and of one that is refused."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import try_families
from families import compare, docs
from families.subject import CLOSE, Unlike, opened
from families.tiny import FAMILIES, put_down

from steer_heal.lm.batch import Pair


def walked(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, object]]]:
    """Exit status and records of a walk."""
    status = try_families.main([*arguments, "--out", str(out)])
    capsys.readouterr()
    return status, try_families.read(out)


def test_one_that_agrees_and_one_that_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "walk.jsonl"
    status, record = walked(capsys, out, "llama", "bart")
    assert status == 0, record
    llama, bart = record["llama"], record["bart"]
    assert llama["outcome"] == "agrees", llama
    assert set(llama["checks"]) == {*compare.CHECKS, "round"}  # type: ignore[call-overload]
    assert (bart["outcome"], bart["said"]) == ("refused", "model.id=... is a bart, not a causal language model")
    before = out.read_text("utf-8")
    status, _ = walked(capsys, out, "llama", "bart", "--resume")
    assert status == 0
    assert out.read_text("utf-8") == before, "what is in the record was tried again"


def test_one_that_takes_too_long_is_stopped_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_down("llama", tmp_path / "mine")
    out = tmp_path / "walk.jsonl"
    status, record = walked(capsys, out, str(tmp_path / "mine"), "--gigabytes", "0")
    assert status == 1
    assert record[str(tmp_path / "mine")]["outcome"] == "wrong", record
    status, record = walked(capsys, out, str(tmp_path / "mine"), "--resume")
    assert (status, record[str(tmp_path / "mine")]["outcome"]) == (0, "agrees"), record


def test_what_is_off_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that leaves out the first token of a completion must not agree."""
    put_down("llama", tmp_path)
    subject = opened(str(tmp_path))
    assert compare.scores(subject) < CLOSE
    plain = compare.score

    def shifted(model: object, pairs: tuple[Pair, ...], **how: object) -> object:
        return plain(model, [Pair(p.prompt[1:], p.completion) for p in pairs], **how)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "score", shifted)
    with pytest.raises(Unlike, match="log-probs: off by"):
        compare.scores(subject)


def test_a_name_that_is_no_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        try_families.main(["lama"])
    assert "lama: neither a family" in capsys.readouterr().err


def test_the_page_lists_every_family() -> None:
    """Of the transformers that it was written for; another has other families."""
    page = docs.PAGE.read_text("utf-8").partition(docs.BEGIN)[2].partition(docs.END)[0]
    of_this = f"transformers {version('transformers')}," in page
    missing = [name for name in FAMILIES if of_this and f"`{name}`" not in page]
    assert not missing, f"docs/models.md says nothing of {missing[:5]}: scripts/try_families.py --resume --write-docs"
