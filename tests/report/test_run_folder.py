"""A run's folder: what is kept of an earlier run, and adapters that PEFT loads with their base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from helpers.compose import composed
from helpers.toys import adapter, by_hand

from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.report import run_folder


def test_a_rerun_in_the_same_folder_loses_nothing(tmp_path: Path) -> None:
    """Adapters that somebody edited are kept beside the former result; what is not a run's stays where it is."""
    for name in (
        "result.json",
        "adapter-round-9.txt",
        "adapter-round-0/note",
        "adapter-round-0-mine/x",
        "items/base/y",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    run_folder.rotate(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "result.1.json", "adapter-round-9.txt", "adapter-round-0.1/note", "adapter-round-0-mine/x", "items.1/base/y",
    }  # fmt: skip


def test_an_adapter_names_its_base(saved: Path, tmp_path: Path) -> None:
    """A folder by its path; a snapshot in the Hub's cache, also by its path, by id and commit; the bundled by name."""

    def source(model_id: Path | str, **given: Any) -> tuple[str, str | None] | None:
        return (
            composed("experiment=tiny", "model=hub", f"model.id='{model_id}'").model.model_copy(update=given).source()
        )

    assert source(saved) == (str(saved), None)
    snapshot = tmp_path / "hub/models--some-one--small--model/snapshots/0123abc"
    shutil.copytree(saved, snapshot)
    assert source(snapshot) == ("some-one/small--model", "0123abc")
    assert source("some-one/gone", revision="main") == ("some-one/gone", "main"), "deleted since the run began"
    assert composed("model=smollm2_135m").model.source() == ("HuggingFaceTB/SmolLM2-135M-Instruct", None)


def test_an_adapter_of_a_folder_is_found_by_peft(tiny: Base, saved: Path, tmp_path: Path) -> None:
    """Reference: AutoPeftModelForCausalLM, which reads the base's place from the adapter alone."""
    learned, place = adapter(tiny, 1), tmp_path / "adapter-round-0"
    run_folder._write_adapter(place, learned, None, (str(saved), None))
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(place))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, by_hand(Student(tiny).learn(learned))(ids).logits)
