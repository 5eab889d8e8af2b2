"""The store: finding results again, keys, damage, and concurrent processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from steer_heal.artifacts import Adapter, Artifact, Completion, Completions, Metrics, SteeringVector
from steer_heal.config import Config
from steer_heal.store import Store, intact, publish
from steer_heal.store import stage as named
from steer_heal.store.keys import VERSIONS, fingerprint

ODD = 'ok \u2028 \u2029 \x85 \x0b \x0c \x1c \x00 \r\n \r \t \\ " 愛 🙂 e\u0301 </s>'


class Option(Config):
    size: float
    kind: Literal["a", "b"] = "a"
    nested: tuple[dict[str, int], ...] = ()


class Another(Option):
    """The same fields with another meaning."""


VECTOR = SteeringVector(
    layers=(3, 5), directions=torch.tensor([[1.0, 2.0**-149, -0.0], [1e18, -2.0, 0.1]]), snr=(0.5, 1 / 3)
)
COMPLETIONS = Completions(
    rows=(
        Completion(ODD, (1, 2), (3,), ODD, 0.1 + 0.2, True, {"perplexity": 1 / 3, "trait": -1e-17}, ("length",), False),
        Completion("", (0,), (), "", 1e300, False, kept=True),
    )
)
ADAPTER = Adapter(
    config={"r": 2, "lora_alpha": 3.0, "target_modules": ["q_proj"], "peft_type": "LORA"},
    factors={
        "layers.0.q_proj.lora_A.weight": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
        "layers.0.q_proj.lora_B.weight": torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).T.contiguous().T,
    },
    curve=({"step": 0, "nll": 2.5}, {"step": 1, "nll": 2.0, "val_nll": 3.0}),
    summary={"steps": 2, "shrink": 1 / 3},
)
METRICS = Metrics(values={"trait": 0.1 + 0.2, "count": 3.0})


@named("test_store.make_vector")
def make_vector(*_: Any, **__: Any) -> SteeringVector:
    return VECTOR


@named("test_store.make_completions")
def make_completions(*_: Any, **__: Any) -> Completions:
    return COMPLETIONS


@named("test_store.make_adapter")
def make_adapter(*_: Any, **__: Any) -> Adapter:
    return ADAPTER


@named("test_store.make_metrics")
def make_metrics(*_: Any, **__: Any) -> Metrics:
    return METRICS


STAGES: list[Callable[..., Artifact]] = [make_vector, make_completions, make_adapter, make_metrics]


@pytest.fixture
def store(store_folder: Path) -> Store:
    return Store(store_folder)


def place(store: Store, artifact: Artifact) -> Path:
    """The folder of a published result."""
    folder = store.where(artifact)
    assert folder is not None, f"{artifact.key} is not there"
    return folder


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal to the bit, tensors included."""
    assert type(one) is type(other), f"{where}: {type(one)} became {type(other)}"
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, f"{where}: {one.dtype} became {other.dtype}"
        assert torch.equal(one, other), f"{where}: a tensor changed"
        assert torch.equal(one.signbit(), other.signbit()), f"{where}: the sign of a zero changed"
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name != "key":
                assert_same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{where}: fields {one.keys()} became {other.keys()}"
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, tuple):
        assert len(one) == len(other), f"{where}: {len(one)} became {len(other)}"
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, f"{where}: {one!r} became {other!r}"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_second_call_finds_what_the_first_made(store: Store, stage: Callable[..., Artifact]) -> None:
    """Reference: the value itself, field by field, to the bit; odd signs and line separators included."""
    first, second = store(stage, "x"), store(stage, "x")
    assert store.computed == [f"test_store.{stage.__name__}"], f"computed {store.computed}"
    assert_same(stage(), first, "published")
    assert_same(first, second, "found")
    assert first.key == second.key != "", "a result without a key, or with two"
    assert_same(stage(), Store(store.root)(stage, "x"), "found by another process")
    folder = place(store, first)
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == sorted(
        path.name for path in folder.iterdir() if path.name != "manifest.json"
    ), "the manifest does not list every file"


def key(store: Store, *what: Any, **how: Any) -> str:
    return store(make_metrics, *what, **how).key


def test_keyword_arguments_do_not_enter_the_key(store: Store) -> None:
    """Reference: how a result is carried out does not define it."""
    assert key(store, 1, threads=2) == key(store, 1, threads=4, log=print) == key(store, 1)
    assert len(store.computed) == 1, f"computed {len(store.computed)} times"


def test_what_changes_a_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: any other argument, field, type, artifact, stage or version of a stage is another result."""
    one, other = store(make_vector, 1), store(make_vector, 2)
    option = Option(size=1)
    calls: dict[str, tuple[Any, ...]] = {
        "nothing": (), "a number": (1,), "another": (2,), "a float": (1.5,), "text": ("1",), "none": (None,),
        "true": (True,), "two": (1, 2), "a list": ([1, 2],), "nested": ([1], 2), "an option": (option,),
        "its field": (Option(size=2),), "its other field": (Option(size=1, kind="b"),),
        "its nested field": (Option(size=1, nested=({"a": 1},)),), "another class": (Another(size=1),),
        "options by name": ({"a": option},), "by another name": ({"b": option},), "a mapping": ({"a": 1},),
        "an artifact": (one,), "another artifact": (other,), "a dataclass": (COMPLETIONS.rows[0],),
        "another dataclass": (COMPLETIONS.rows[1],), "a path": (Path("a"),),
    }  # fmt: skip
    keys = {name: key(store, *what) for name, what in calls.items()}
    keys["another stage"] = store(make_vector).key
    monkeypatch.setitem(VERSIONS, "test_store.make_metrics", 2)
    keys["another version"] = key(store)
    for name, found in keys.items():
        twins = [other for other, k in keys.items() if k == found and other != name]
        assert not twins, f"{name} has the key of {twins}"


def test_what_does_not_change_a_key(store: Store) -> None:
    """Reference: equal values are equal, in whatever order a mapping was written."""
    assert key(store, Option(size=1)) == key(store, Option(size=1, kind="a"))
    assert key(store, {"a": 1, "b": 2}) == key(store, {"b": 2, "a": 1})
    assert key(store, (1, 2)) == key(store, [1, 2])
    assert key(store, store(make_vector, 1)) == key(store, Store(store.root)(make_vector, 1))


def test_keys_chain(store: Store) -> None:
    """Reference: a changed input of the first stage changes the key of the second."""
    small, large = (store(make_vector, Option(size=size)) for size in (1, 2))
    assert key(store, small) != key(store, large), "what an artifact was made from does not enter later keys"


def test_an_unpublished_artifact_is_refused(store: Store) -> None:
    """Reference: it has no key, so what is made from it could not be told apart."""
    with pytest.raises(TypeError, match="unpublished SteeringVector"):
        store(make_metrics, VECTOR)
    with pytest.raises(TypeError, match="unpublished Metrics"):
        fingerprint({"deep": [METRICS]})
    assert not store.computed, "the stage ran all the same"


def test_a_value_that_cannot_be_part_of_a_key_is_refused(store: Store) -> None:
    """Reference: a function or a tensor has no value that a key could be made of."""
    for value in (print, torch.zeros(2), {1, 2}):
        with pytest.raises(TypeError, match=f"{type(value).__name__} cannot be part of a key"):
            store(make_metrics, value)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "a bit flipped": lambda data: data[:-15] + bytes([data[-15] ^ 4]) + data[-14:],
    "not text": lambda data: b"\xff" + data[1:],
}


@pytest.mark.parametrize("name", ["completions.jsonl", "manifest.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_result_is_found_and_made_again(store: Store, name: str, how: str, warnings: list[str]) -> None:
    """Reference: the undamaged result; the damage is logged, and the folder kept aside for who wants to look."""
    first = store(make_completions)
    path = place(store, first) / name
    damaged = DAMAGE[how](path.read_bytes())
    path.write_bytes(damaged)
    second = store(make_completions)
    assert len(store.computed) == 2, f"{name} {how}: it was read back all the same"
    assert_same(first, second, "made again")
    assert intact(place(store, second)), "what was made again is not intact"
    (aside,) = store.root.glob(f"*/.damaged-*/*/{name}")
    assert aside.read_bytes() == damaged, "the damaged file was not kept as it was"
    assert any(second.key in line for line in warnings), f"no warning names the folder: {warnings}"
    store(make_completions)
    assert len(store.computed) == 2, "it is made again and again"


def test_a_missing_file_is_damage_too(store: Store, warnings: list[str]) -> None:
    """Reference: a manifest that lists a file which is gone."""
    first = store(make_adapter)
    (place(store, first) / "adapter_model.safetensors").unlink()
    assert_same(first, store(make_adapter), "made again")
    assert warnings, "a missing file was not logged"


def test_a_manifest_of_another_shape_is_damage_too(store: Store, warnings: list[str]) -> None:
    """Reference: valid JSON that is no manifest."""
    for text in ("[]", "null", '{"files": 3}', '{"files": {"metrics.json": null}}', "{}"):
        (place(store, store(make_metrics)) / "manifest.json").write_text(text)
        assert_same(METRICS, store(make_metrics), f"after {text}")
    assert len(store.computed) == 6, f"computed {len(store.computed)} times for five broken manifests"


def test_a_killed_job_leaves_no_result(store: Store) -> None:
    """Reference: without a manifest, which is written last, there is no result; and no warning about what is normal."""
    first = store(make_metrics)
    (place(store, first) / "manifest.json").unlink()
    assert_same(METRICS, store(make_metrics), "made again")
    assert len(store.computed) == 2, "half a result was taken for a whole one"


@named("test_store.failing")
def failing() -> Metrics:
    raise RuntimeError("broken stage")


def test_a_stage_that_raises_leaves_nothing(store: Store) -> None:
    """Reference: an empty folder."""
    with pytest.raises(RuntimeError, match="broken stage"):
        store(failing)
    left = [path for path in store.root.rglob("*") if path.is_file()]
    assert not left, f"{left} was left behind"


ROUNDS = 60


@pytest.mark.parametrize("stage", STAGES)
def test_a_result_that_cannot_be_written_is_named(store_folder: Path, stage: Callable[..., Artifact]) -> None:
    """Whoever writes it: errors of an open file, and those of safetensors, say what is wrong but not where."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="stage/key") as error:
            publish(stage(), store_folder / "stage/key", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(error.value)
    assert not list(store_folder.glob("*/*")), "half of it is left"


def rival(root: Path, start: Any, results: Any) -> None:
    """Publish the same keys as another process, starting each at the same moment; every other one is damaged before."""
    try:
        for i in range(ROUNDS):
            folder = root / "stage" / f"{i}"
            start.wait(30)
            publish(METRICS, folder, {"i": i})
            start.wait(30)
            assert_same(METRICS, Metrics.load(folder), f"round {i}")
        results.put("done")
    except BaseException as error:  # noqa: BLE001 the other process must hear of it
        start.abort()
        results.put(f"{type(error).__name__}: {error}")


def test_two_processes_publish_the_same_key_at_once(store_folder: Path) -> None:
    """Reference: each of them ends without an error and finds the result whole, also where a damaged one stood."""
    for i in range(0, ROUNDS, 2):
        folder = store_folder / "stage" / f"{i}"
        publish(METRICS, folder, {"i": i})
        (folder / "metrics.json").write_text("damaged")
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    rivals = [context.Process(target=rival, args=(store_folder, start, results)) for _ in range(2)]
    for process in rivals:
        process.start()
    said = [results.get(timeout=60) for _ in rivals]
    for process in rivals:
        process.join(30)
    assert said == ["done", "done"], f"the processes ended with {said}"
    broken = [i for i in range(ROUNDS) if not intact(store_folder / "stage" / f"{i}")]
    assert not broken, f"results {broken} are not whole"
    scratch = [path.name for path in (store_folder / "stage").glob(".writing-*")]
    assert not scratch, f"scratch folders {scratch} were left behind"


def test_where(store: Store) -> None:
    """Reference: the folder's name is the key, the folder above it the stage."""
    found = place(store, store(make_metrics, 5))
    assert found.parent == store.root / "test_store.make_metrics", found
    assert os.listdir(found.parent) == [found.name], "something else stands beside the result"
