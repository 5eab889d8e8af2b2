"""Invalid input of `steer=file` is rejected in one line, before weights load: field, value, what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFEndian
from helpers.compose import composed
from helpers.replay import chosen
from helpers.saying import Said, never
from helpers.saying import here as here
from helpers.saying import say as say
from helpers.toys import runtime
from helpers.vectors import as_gguf, as_safetensors, directions, named
from omegaconf import OmegaConf
from safetensors.torch import save_file
from test_steer import CONTEXTS, PERSONAS
from test_steer_methods import METHODS

from steer_heal import model
from steer_heal.config import ConfigError, build
from steer_heal.config.errors import one_line
from steer_heal.experiment import Experiment
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.steer import extract
from steer_heal.steer.file import read
from steer_heal.store import Store

D = directions((1, 2))
A_FILE = "must be a file of directions, one a block; this one "
ONE, TWO = np.ones(32, np.float32), torch.ones(2, 32)
NO_NORM = f"{A_FILE}has directions whose norms are 0 or not finite, for block "


def made(**fields: Any) -> Experiment:
    """The tiny experiment with `steer=file` and these fields, ready to run."""
    cfg = chosen("steer=file").copy()
    OmegaConf.update(cfg, "steer", fields)
    exp = build(cfg)
    assert isinstance(exp, Experiment)
    exp.prepare()
    return exp


def refused(**fields: Any) -> str:
    """The error that a user sees of such an experiment: one line that begins with a field and its value."""
    with pytest.raises(ConfigError) as error:
        made(**fields)
    line = one_line(error.value)
    assert "\n" not in line
    assert len(line) < 400, f"{len(line)} characters are no line that a person reads: {line}"
    given = tuple(f"steer.{name}={value!r:.200} is not allowed: " for name, value in fields.items())
    assert line.startswith(given), f"none of {given} comes first: {line}"
    return line


@pytest.fixture(autouse=True)
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make loading weights fail. The tiny fixture's are loaded already."""
    monkeypatch.setattr(model, "_ready", never)


def written(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


def tensors(**by_name: torch.Tensor) -> Callable[[Path], Path]:
    return written("v.safetensors", lambda path: save_file({name: one.clone() for name, one in by_name.items()}, path))


def spoilt(number: float) -> torch.Tensor:
    """A direction with one bad number."""
    direction = D[1].clone()
    direction[3] = number
    return direction


def gguf(kind: str = "F32", architecture: str = "controlvector", **how: Any) -> Callable[[Path], Path]:
    return written("v.gguf", lambda path: as_gguf(path, named(D), kind, architecture, **how))


def integers(path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.1", ONE.astype(np.int8))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def stored(about: str | None, saved: torch.Tensor = TWO) -> Callable[[Path], Path]:
    """A file such as our store's, with what is beside it."""

    def make(path: Path) -> None:
        save_file({"directions": saved}, path)
        if about is not None:
            path.with_suffix(".json").write_text(about)

    return written("v.safetensors", make)


def about(layers: Any, how: str = "add") -> str:
    return json.dumps({"layers": layers, "how": how})


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {  # how it comes to be there; what the line says of it
    "nothing": (lambda folder: folder / "v.gguf", "must be a file that can be read: No such file or directory"),
    "a folder": (written("v.gguf", Path.mkdir), "must be a file that can be read: Is a directory"),
    "below a file": (
        lambda folder: as_safetensors(folder / "v.safetensors", D) / "w.gguf",
        "must be a file that can be read: Not a directory",
    ),
    "a name too long": (lambda folder: folder / f"{'x' * 270}.gguf", "must be a file that can be read: File name too"),
    "no suffix": (written("vector", lambda path: path.write_bytes(b"x")), "must be a .safetensors or .gguf file"),
    "pickled": (written("v.pt", lambda path: torch.save(D, path)), "must be a .safetensors or .gguf file"),
    "empty safetensors": (written("v.safetensors", Path.touch), A_FILE + "cannot be read as safetensors: "),
    "empty gguf": (written("v.gguf", Path.touch), A_FILE + "cannot be read as GGUF: "),
    "a gguf called safetensors": (
        written("v.safetensors", lambda path: as_gguf(path, named(D))), A_FILE + "cannot be read as safetensors: ",
    ),
    "safetensors called gguf": (
        written("v.gguf", lambda path: as_safetensors(path, D)), A_FILE + "cannot be read as GGUF: GGUF magic invalid",
    ),
    "gguf of a model": (gguf(architecture="llama"), A_FILE + "is of architecture 'llama', not 'controlvector'"),
    "the other byte order": (gguf(endianess=GGUFEndian.BIG), A_FILE + "has a different byte order from this machine"),
    "gguf of integers": (written("v.gguf", integers), A_FILE + "cannot be read as GGUF: Dequantization for I8 is"),
    "gguf without a direction": (
        written("v.gguf", lambda path: as_gguf(path, {"output": ONE})), A_FILE + "has no tensor that is named after a",
    ),
    "two in gguf": (
        written("v.gguf", lambda path: as_gguf(path, {"direction.1": ONE, "direction.01": ONE})),
        A_FILE + "has several tensors for block 1",
    ),
    "no name with a block": (
        tensors(weight=D[1], direction1=D[1]), A_FILE + "has no tensor that is named after a block, such as direction.",
    ),
    "nothing in it": (tensors(), A_FILE + "has no tensor that is named after a block"),
    "two for a block": (tensors(a_1=D[1], b_1=D[1]), A_FILE + "has several tensors for block 1"),
    "a negative block": (tensors(**{"direction.-1": D[1]}), A_FILE + "has a tensor for block -1"),
    "two lengths": (tensors(a_1=D[1], a_2=D[1][:16].clone()), A_FILE + "has tensors of the shapes [16], [32], not vec"),
    "a matrix": (tensors(a_1=TWO), A_FILE + "has tensors of the shapes [2, 32], not vectors of one length"),
    "a number": (tensors(a_1=torch.tensor(1.0)), A_FILE + "has tensors of the shapes [], not vectors of one length"),
    "zeros": (tensors(a_1=D[1], a_2=torch.zeros(32)), NO_NORM + "2"),
    "no numbers": (tensors(a_1=torch.ones(0)), NO_NORM + "1"),
    "a nan": (tensors(a_1=D[1], a_2=spoilt(torch.nan)), NO_NORM + "2"),
    "an infinity": (tensors(a_1=spoilt(-torch.inf), a_2=D[2]), NO_NORM + "1"),
    "too small to have a norm": (tensors(a_1=D[1] * 1e-30, a_2=D[2]), NO_NORM + "1"),
    "too large to have a norm": (tensors(a_1=D[1] * 1e30, a_2=D[2] * 1e30), NO_NORM + "1, 2"),
    "beyond float32": (tensors(a_1=D[1].double() * 1e300), NO_NORM + "1"),
    "another width": (tensors(a_1=torch.ones(33)), "its directions have 33 numbers, the model's states 32"),
    "another depth": (
        tensors(a_1=D[1], a_9=D[1]),
        "is for blocks 1, 9, the model has 4 blocks, 0 to 3; 'steer.layers=[...]' chooses among them",
    ),
    "directions of no block": (stored(None), A_FILE + "has a tensor named directions but no v.json beside it"),
    "broken json": (stored("{"), "no v.json beside it that lists its blocks"),
    "another json": (stored("[]"), "no v.json beside it that lists its blocks"),
    "half a json": (stored('{"layers": [1, 2]}'), "no v.json beside it that lists its blocks"),
    "fewer blocks than directions": (stored(about([1])), "no v.json beside it that lists its blocks"),
    "blocks that are a number": (stored(about(3)), "no v.json beside it that lists its blocks"),
    "one block twice": (stored(about([1, 1])), A_FILE + "has several tensors for block 1"),
    "a persona": (stored(about([]), torch.empty(0, 0)), A_FILE + "has no tensor that is named after a block"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_no_use(tmp_path: Path, what: str) -> None:
    make, said = FILES[what]
    assert said in refused(path=str(make(tmp_path)))


@pytest.mark.parametrize("path", [None, 3, ""])
def test_no_path(path: Any) -> None:
    line = refused(path=path)
    assert line.endswith("is not allowed: must be a " + (".safetensors or .gguf file" if path == "" else "path"))


@pytest.mark.parametrize("layers", [[3], [1, 3], [1, 1], [-1], []])
def test_layers_that_are_not_in_the_file(tmp_path: Path, layers: list[int]) -> None:
    line = refused(path=str(as_gguf(tmp_path / "v.gguf", named(D))), layers=layers)
    assert line == f"steer.layers={layers} is not allowed: must be null, or distinct blocks of those in the file, 1, 2"


@pytest.mark.parametrize("layers", [["a"], [1.0], [True], "auto", 1])
def test_layers_that_are_no_blocks(tmp_path: Path, layers: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^steer\.layers.*=.* is not allowed: must be a (list(: write 'steer.layers=.1.')?|valid integer)$",
    ):
        made(path=str(as_gguf(tmp_path / "v.gguf", named(D))), layers=layers)


def test_a_block_beyond_the_depth_may_be_left_out(tmp_path: Path) -> None:
    """A model's own blocks can be chosen from a file for a deeper one; the others are refused by their own field."""
    path = str(as_gguf(tmp_path / "v.gguf", named(directions((1, 9)))))
    assert refused(path=path, layers=[9]) == "steer.layers=[9] is not allowed: the model has 4 blocks, 0 to 3"
    made(path=path, layers=[1])


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_every_file_that_is_cut_short(tmp_path: Path, suffix: str) -> None:
    """Cut at every third byte. Each direction fills whole units of 32 bytes, so that not even the last is padding."""
    path = tmp_path / f"v.{suffix}"
    whole = (as_gguf(path, named(D)) if suffix == "gguf" else as_safetensors(path, D)).read_bytes()
    assert list(read(path)) == [1, 2]
    for n in [*range(0, len(whole), 3), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"^a file of directions, one a block; this one (is|has|cannot) "):
            read(path)


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_garbage_never_raises_anything_else(tmp_path: Path, suffix: str) -> None:
    """Random bytes, and single bytes of the header changed: it is read or refused."""
    path, rng = tmp_path / f"v.{suffix}", np.random.default_rng(0)
    whole = (as_gguf(path, named(D)) if suffix == "gguf" else as_safetensors(path, D)).read_bytes()
    drawn = [rng.bytes(int(n)) for n in rng.integers(1, 2000, 30)]
    drawn += [whole[:8] + rng.bytes(300) for _ in range(30)]
    for where in rng.integers(0, 200, 300):
        drawn.append(whole[:where] + rng.bytes(1) + whole[where + 1 :])
    said = []
    for content in drawn:
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            said.append(str(error))
    assert len(drawn) > len(said) > 200
    assert all(line.startswith("a file of directions, one a block; this one ") for line in said)


@pytest.mark.parametrize(("name", "how"), [("ablate", "ablate"), ("cosine_gated", "gate")])
def test_a_stored_vector_that_is_not_added_is_refused(tiny: Base, tmp_path: Path, name: str, how: str) -> None:
    store = Store(tmp_path / "store")
    made = store(extract, METHODS[name], Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
    folder = store.where(made)
    assert folder is not None
    assert f"cannot be added to states: it was made to {how}" in refused(path=str(folder / "vector.safetensors"))


TYPED = {
    "model=tiny steer=file": ("steer.path", "missing; give steer.path=VALUE"),
    "model=tiny steer=file steer.path=no.gguf": ("steer.path='no.gguf'", "must be a file that can be read: No such"),
    "-m model=tiny seed=0,1 steer=file steer.path=wide.gguf": ("steer.path='wide.gguf'", "33 numbers, the model's"),
    "model=tiny steer=file steer.path=good.gguf steer.layers=[5]": ("steer.layers=[5]", "distinct blocks of those in"),
}


@pytest.mark.parametrize("typed", TYPED)
def test_the_command_says_it(
    say: Callable[[str], Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    """The complete command of a user, whose folder is left unchanged."""
    for name, width in (("good", 32), ("wide", 33)):
        as_gguf(tmp_path / f"{name}.gguf", named(directions(width=width)))
    monkeypatch.chdir(tmp_path)
    say(typed).refused(*TYPED[typed])


def test_composed_as_all_others(tmp_path: Path) -> None:
    """The same through Hydra's own composition, beside a valid example."""
    good = as_gguf(tmp_path / "good.gguf", named(D))
    composed("experiment=tiny", "steer=file", f"steer.path={good}").prepare()
    with pytest.raises(
        ConfigError, match=r"^steer\.path='.*bad\.gguf' is not allowed: must be a file that can be read"
    ):
        composed("experiment=tiny", "steer=file", f"steer.path={tmp_path / 'bad.gguf'}")
