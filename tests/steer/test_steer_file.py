"""A vector from a file, against what was written into it and a hook by hand; see test_steer_file_refused.py too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import runtime
from helpers.vectors import as_gguf, as_safetensors, directions, named
from test_steer import CONTEXTS, PERSONAS, hooked, run
from test_steer_methods import METHODS
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.lm.base import Base
from steer_heal.lm.hooks import steered
from steer_heal.lm.student import Student
from steer_heal.steer import Teacher, extract
from steer_heal.steer.file import File, read
from steer_heal.store import Store
from steer_heal.store.keys import fingerprint

BACKWARDS = directions((3, 2, 0))  # repeng begins at the last block
IDS = torch.arange(10, 22).reshape(2, 6)


def given(path: Path, layers: tuple[int, ...] | None = None, norm: Any = "mean_diff") -> File:
    return File(name="file", path=path, layers=layers, norm=norm)


def vector_of(student: Student, teacher: Teacher) -> SteeringVector:
    return extract(teacher, student, PERSONAS, CONTEXTS, runtime=runtime())


def stacked(by_block: dict[int, Tensor], *blocks: int) -> Tensor:
    return torch.stack([by_block[block] for block in blocks])


@pytest.mark.parametrize(
    ("kind", "close"), [("F32", 0), ("F64", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254 + 2**-11)]
)
def test_a_gguf_gives_what_was_written(tmp_path: Path, kind: str, close: float) -> None:
    """Reference: the directions themselves, within a rounding of the format, as a share of the largest number."""
    found = read(as_gguf(tmp_path / "v.gguf", named(BACKWARDS), kind))
    assert list(found) == [0, 2, 3], "not in the order of the blocks"
    for block, direction in found.items():
        assert direction.dtype == torch.float32
        off = float((direction - BACKWARDS[block]).abs().max() / BACKWARDS[block].abs().max())
        assert off <= 1.01 * close, f"block {block} is off by {off:.2g} of its largest number"
        assert close == 0 or off > close / 20, f"{kind}: this test wrote float32"


@pytest.mark.parametrize(
    "name", ["direction.{}", "{}", "layer_{}", "model.layers.{}", "a.1.direction.{}", "direction.0{}", "v-1.{}"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_safetensors_by_any_name_that_ends_in_a_block(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Reference: the directions themselves, among tensors that are called otherwise."""
    from safetensors.torch import save_file

    tensors = {name.format(block): direction.to(dtype) for block, direction in BACKWARDS.items()}
    save_file(tensors | {"direction.mean": torch.ones(3), "v12": torch.ones(4)}, tmp_path / "v.safetensors")
    found = read(tmp_path / "v.safetensors")
    assert list(found) == [0, 2, 3]
    for block, direction in found.items():
        assert torch.equal(direction, BACKWARDS[block].to(dtype).float()), f"block {block}"


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_norms(tiny: Base, second_round: Student, tmp_path: Path, suffix: str) -> None:
    """Reference: mean_diff's own norm in each layer, of the student at hand; `own` leaves the numbers as they are."""
    path = tmp_path / f"v.{suffix}"
    as_gguf(path, named(BACKWARDS)) if suffix == "gguf" else as_safetensors(path, BACKWARDS)
    plain = METHODS["mean_diff"].model_copy(update={"layers": (0, 2, 3)})
    raw = stacked(BACKWARDS, 0, 2, 3)
    seen = []
    for student in (Student(tiny), second_round):
        found, mean = vector_of(student, given(path)), vector_of(student, plain)
        assert found.layers == (0, 2, 3)
        assert found.norms() == pytest.approx(mean.norms(), rel=1e-5)
        torch.testing.assert_close(found.directions / found.directions.norm(dim=-1, keepdim=True),
                                   raw / raw.norm(dim=-1, keepdim=True))  # fmt: skip
        own = vector_of(student, given(path, norm="own"))
        assert torch.equal(own.directions, raw)
        assert own.snr == pytest.approx(found.snr, rel=1e-4), "it depends on a direction's length"
        seen.append(found.norms())
    assert seen[0] != pytest.approx(seen[1], rel=1e-2), "the two students are alike, so this test sees little"


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, (0, 2, 3)), ((0, 2, 3), (0, 2, 3)), ((2,), (2,)), ((3, 0), (3, 0)), ((0,), (0,))]
)
def test_layers(tiny: Base, tmp_path: Path, layers: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    """Reference: the directions that were written for those blocks."""
    found = vector_of(Student(tiny), given(as_gguf(tmp_path / "v.gguf", named(BACKWARDS)), layers, "own"))
    assert found.layers == expected
    assert torch.equal(found.directions, stacked(BACKWARDS, *expected))


@pytest.mark.parametrize("block", [0, 2])
def test_direction_n_is_added_to_what_block_n_gives(tiny: Base, tmp_path: Path, block: int) -> None:
    """Reference: what enters each block of a whole pass, and a hook by hand; counted from 0, as llama.cpp counts."""
    direction = BACKWARDS[block]
    path = as_gguf(tmp_path / "v.gguf", {f"direction.{block}": direction.numpy()})
    vector = vector_of(Student(tiny), given(path, norm="own"))

    def whole_pass() -> list[Tensor]:
        entered: list[Tensor] = []
        look = lambda _block, inputs: entered.append(inputs[0].clone())  # noqa: E731
        hooks = [one.register_forward_pre_hook(look) for one in tiny.model.model.layers]
        logits = run(tiny.model, IDS)
        for hook in hooks:
            hook.remove()
        return [*entered, logits]

    plain = whole_pass()
    with steered(tiny, vector, 1.5):
        ours = whole_pass()
    with hooked(tiny.model.model.layers[block], lambda h: h + 1.5 * direction):
        theirs = whole_pass()
    for k in range(block + 1):
        assert torch.equal(ours[k], plain[k]), f"what enters block {k} has changed"
    moved = (1.5 * direction).expand_as(plain[0])
    torch.testing.assert_close(ours[block + 1] - plain[block + 1], moved, atol=1e-5, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert float((ours[-1] - plain[-1]).abs().max()) > 1e-2, "nothing came of it"


def test_keys_are_made_of_the_directions(tiny: Base, tmp_path: Path) -> None:
    """Reference: a copy elsewhere and the same numbers in another format have the key, other numbers another."""
    path = as_gguf(tmp_path / "v.gguf", named(BACKWARDS))
    other_place = tmp_path / "elsewhere" / "w.gguf"
    other_place.parent.mkdir()
    shutil.copy(path, other_place)
    same = [given(path), given(other_place), given(path, (0, 2, 3))]
    same.append(given(as_safetensors(tmp_path / "v.safetensors", BACKWARDS)))
    assert all(fingerprint(one) == fingerprint(same[0]) for one in same)
    assert str(tmp_path) not in str(fingerprint(same[0])), "a place is part of the key"
    more = as_safetensors(tmp_path / "more.safetensors", BACKWARDS | directions((1,)))
    assert fingerprint(given(more, (0, 2, 3))) == fingerprint(same[0]), "blocks that are not chosen count"
    moved = {block: direction.clone() for block, direction in BACKWARDS.items()}
    moved[2][5] += 1e-6
    others = [given(path, norm="own"), given(path, (0, 2)), given(more), given(path, (2, 3))]
    others.append(given(as_safetensors(tmp_path / "moved.safetensors", moved)))
    swapped = {0: BACKWARDS[2], 2: BACKWARDS[0], 3: BACKWARDS[3]}
    others.append(given(as_safetensors(tmp_path / "swapped.safetensors", swapped)))
    prints = [str(fingerprint(one)) for one in [same[0], *others]]
    assert len(set(prints)) == len(prints), "two that differ have one key"
    store = Store(tmp_path / "store")
    keys = [store(extract, one, Student(tiny), PERSONAS, CONTEXTS, runtime=runtime()).key for one in same]
    assert len(set(keys)) == 1
    assert store.computed == ["steer.extract"]


def test_an_option_is_what_was_in_the_file_when_it_was_made(tiny: Base, tmp_path: Path) -> None:
    """Reference: its directions before the file was written over and then deleted while a run is going."""
    path = as_gguf(tmp_path / "v.gguf", named(BACKWARDS))
    option = given(path, norm="own")
    before = fingerprint(option)
    as_gguf(path, named(directions((0, 2, 3), seed=1)))
    fresh = given(path, norm="own")
    assert fingerprint(fresh) != before, "what was read first is remembered for ever"
    path.unlink()
    assert fingerprint(option) == before
    assert torch.equal(vector_of(Student(tiny), option).directions, stacked(BACKWARDS, 0, 2, 3))


@pytest.mark.parametrize("name", ["mean_diff", "pca", "random"])
def test_a_vector_of_our_own_store_comes_back(tiny: Base, tmp_path: Path, name: str) -> None:
    """Reference: the vector itself, as it is and at its own norm."""
    store = Store(tmp_path / "store")
    backwards = METHODS[name].model_copy(update={"layers": (2, 1)})
    made = store(extract, backwards, Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
    folder = store.where(made)
    assert folder is not None
    path = folder / "vector.safetensors"
    own = vector_of(Student(tiny), given(path, (2, 1), "own"))
    assert torch.equal(own.directions, made.directions)
    found = vector_of(Student(tiny), given(path))
    assert found.layers == (1, 2)
    torch.testing.assert_close(found.directions, made.directions[[1, 0]], atol=1e-6, rtol=1e-5)
    assert found.snr == pytest.approx(made.snr[::-1], rel=1e-4)
