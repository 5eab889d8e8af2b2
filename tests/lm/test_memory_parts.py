"""Batches as large as memory allows: halving when it runs out, and the estimate beforehand."""

from __future__ import annotations

import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from helpers.families import ODD, PLAIN, family
from helpers.toys import runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from steer_heal import generate as generating
from steer_heal.artifacts import SteeringVector
from steer_heal.generate import Sampling, generate
from steer_heal.lm import memory
from steer_heal.lm.base import Base
from steer_heal.lm.decode import decode
from steer_heal.lm.memory import available, in_parts, out_of_memory, rows_that_fit
from steer_heal.lm.student import Student

CPU = torch.device("cpu")
GIB = 2**30
TOO_MUCH = 2**60  # bytes: no address space has as many


RELEASE = memory._release


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate remembered sizes from other tests, and skip garbage collection, which is slow."""
    monkeypatch.setattr(memory, "_fitted", {})
    monkeypatch.setattr(memory, "_release", lambda: None)


class Limited:
    """Does up to so many things at once, and runs out of memory in some way beyond that."""

    def __init__(self, most: int, fail: Callable[[], Any]) -> None:
        self.most, self.fail, self.sizes = most, fail, list[int]()

    def __call__(self, part: slice) -> list[int]:
        self.sizes.append(part.stop - part.start)
        if self.sizes[-1] > self.most:
            self.fail()
        return list(range(part.start, part.stop))


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


FAILURES: dict[str, Callable[[], Any]] = {
    "torch on a GPU": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "CUDA itself": raising(RuntimeError("CUDA error: out of memory")),
    "MPS": raising(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)")),
    "torch on the CPU": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),  # for real
    "oneDNN": raising(RuntimeError("could not create a primitive")),
    "C++": raising(RuntimeError("std::bad_alloc")),
    "Python": lambda: bytearray(TOO_MUCH),
    "numpy": lambda: np.empty(TOO_MUCH, dtype=np.uint8),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_where_memory_runs_out_half_as_many_are_done(fail: Callable[[], Any], warnings: list[str]) -> None:
    """Reference: 20, 10 and 5 at once, of which 5 fit; then no more than 5, also in later calls."""
    run = Limited(6, fail)
    assert list(in_parts("a", 20, 32, run)) == list(range(20)), "results are lost, doubled or out of order"
    assert run.sizes == [20, 10, 5, 5, 5, 5]
    assert warnings == [f"a: out of memory with {n} at once; continuing with {n // 2}" for n in (20, 10)]
    again = Limited(6, fail)
    assert list(in_parts("a", 12, 32, again)) == list(range(12))
    assert again.sizes == [5, 5, 2], "what fitted was not remembered"
    other = Limited(32, fail)
    assert list(in_parts("b", 12, 32, other)) == list(range(12))
    assert other.sizes == [12], "what is remembered is of something else"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=st.integers(0, 60), most=st.integers(1, 64), fits=st.integers(1, 64), again=st.integers(0, 30))
def test_all_is_done_once_and_in_order(n: int, most: int, fits: int, again: int) -> None:
    """Reference: the numbers themselves; never more at once than allowed; no size that failed is tried again."""
    memory._fitted.clear()
    run = Limited(fits, FAILURES["CUDA itself"])
    for count in (n, again):
        assert list(in_parts("a", count, most, run)) == list(range(count))
    assert max(run.sizes, default=0) <= most
    failed = [size for size in run.sizes if size > fits]
    assert failed == sorted(set(failed), reverse=True), f"tried {run.sizes} where {fits} fit"


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("no"), KeyError("x")], ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    """Reference: the error itself, after one attempt."""
    run = Limited(1, raising(error))
    with pytest.raises(type(error)) as raised:
        list(in_parts("a", 8, 8, run))
    assert raised.value is error
    assert run.sizes == [8]
    assert memory._fitted == {}


def test_a_size_that_overflows_is_not_taken_for_it() -> None:
    """Reference: torch's own RuntimeError for a number of bytes that is none: half of it is none either."""
    with pytest.raises(RuntimeError, match="overflow") as raised:
        torch.empty(2**62)
    assert not out_of_memory(raised.value)


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_no_room_for_one_is_an_error(fail: Callable[[], Any]) -> None:
    """Reference: what the attempt at one raised."""
    run = Limited(0, fail)
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        list(in_parts("a", 5, 4, run))
    assert out_of_memory(raised.value)
    assert run.sizes == [4, 2, 1]


class Cyclic:
    """Memory that only a collection of garbage frees."""

    def __init__(self) -> None:
        self.itself, self.keys = self, torch.zeros(8)


def test_what_an_attempt_held_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a weak reference to it, also where it was in a cycle as a model's caches are."""
    monkeypatch.setattr(memory, "_release", RELEASE)
    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def run(part: slice) -> list[int]:
        alive.extend(ref() is not None for ref in held)
        cache = Cyclic()
        held.append(weakref.ref(cache))
        if part.stop - part.start > 1:
            FAILURES["torch on the CPU"]()
        return [part.start]

    assert list(in_parts("a", 2, 4, run)) == [0, 1]
    assert alive[0] is False, "a failed attempt still holds its memory"


SAMPLING = Sampling(name="test", n_prompts=None, max_new_tokens=10, n_samples=2, temperature=1.0, top_k=50, top_p=0.9)
PROMPTS = ("hello", "what is it that people like to know about this?", "a long day at work")
VECTOR = SteeringVector(layers=(1,), directions=torch.linspace(-1, 1, 32)[None], snr=(1.0,))


def answers(base: Base, batch: int) -> Any:
    given = (SAMPLING, Student(base), "You are a helpful assistant.", PROMPTS, VECTOR, (0.5, 1.5), 3, 100)
    return generate(*given, runtime=runtime(generate_batch=batch)).rows


@pytest.mark.parametrize("fits", [1, 2, 5, 11])
def test_answers_are_the_same_however_they_were_split(tiny: Base, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """Reference: all rows side by side; here decoding runs out of memory, for real, beyond so many rows."""
    whole = answers(tiny, 100)
    assert len(whole) == 12
    done: list[int] = []

    def limited(base: Base, prompts: Any, *rest: Any) -> Any:
        said = decode(base, prompts, *rest)
        if len(prompts) > fits:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        done.append(len(prompts))
        return said

    monkeypatch.setattr(generating, "decode", limited)
    rows = answers(tiny, 100)
    assert max(done) <= fits
    assert len(done) > 1
    other = [i for i, (one, two) in enumerate(zip(whole, rows, strict=True)) if one != two]
    assert not other, f"rows {other} differ when {done} are generated side by side"
    assert answers(tiny, 100) == whole, "the next answers differ"


def test_the_estimate_limits_what_is_generated_at_once(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the smaller of it and the runtime's; without one, the runtime's."""
    seen: list[int] = []

    def noted(base: Base, prompts: Any, *rest: Any) -> Any:
        seen.append(len(prompts))
        return decode(base, prompts, *rest)

    monkeypatch.setattr(generating, "decode", noted)
    for fit, batch, expected in ((5, 8, [5, 5, 2]), (8, 5, [5, 5, 2]), (sys.maxsize, 12, [12])):
        monkeypatch.setattr(generating, "rows_that_fit", lambda *_, fit=fit: fit)
        seen.clear()
        answers(tiny, batch)
        assert seen == expected, f"{fit} fit, {batch} are allowed: {seen}"


@pytest.mark.parametrize("name", [*PLAIN, *ODD])
def test_rows_that_fit_follow_what_is_free(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: one at least, more of more memory, fewer of longer texts, no limit where nothing is known."""
    model = family(name)
    found = []
    for free in (0, 2**10, 2**20, 2**24, 2**30):
        monkeypatch.setattr(memory, "available", lambda _, free=free: free)
        found.append(rows_that_fit(model, 50, 20))
    assert found[0] == found[1] == 1
    assert found == sorted(found), f"less fits into more: {found}"
    assert found[-1] > found[-2] > 1, f"{found}"
    assert rows_that_fit(model, 500, 20) < found[-1], "long prompts take no more than short ones"
    assert rows_that_fit(model, 50, 500) <= found[-1]
    monkeypatch.setattr(memory, "available", lambda _: None)
    assert rows_that_fit(model, 50, 20) == sys.maxsize


@pytest.mark.parametrize("name", PLAIN)
def test_keys_and_values_of_the_rows_that_fit_do_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the bytes of a cache that a model filled. A limit of a tenth of the truth would do no harm either."""
    model, free = family(name), 2**22
    monkeypatch.setattr(memory, "available", lambda _: free)
    cache = DynamicCache()  # which keeps all tokens also where a block looks at a window of them
    ids = torch.full((1, 70), 7)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    row = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    rows = rows_that_fit(model, 50, 20)
    assert rows * row <= free / 2, f"{rows} rows of {row} bytes into half of {free}"
    assert rows * row >= free / 40, f"only {rows} rows of {row} bytes into {free}"


LAYERED = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
UNEVEN = {  # whose blocks are not of one size
    "Gemma3nTextConfig": {**LAYERED, "intermediate_size": [64, 64, 96, 64], "num_kv_shared_layers": 0},
    "Gemma4TextConfig": {**LAYERED, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16},
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_blocks_of_several_sizes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: bytes by hand: keys and values of 4 blocks of 2 heads; Gemma 4's full attention has heads of 16."""
    config = getattr(transformers, kind)(**UNEVEN[kind], vocab_size=100)
    model = cast(PreTrainedModel, types.SimpleNamespace(config=config, device=CPU, dtype=torch.bfloat16))
    widths = (8, 8, 8, 8) if kind == "Gemma3nTextConfig" else (8, 16, 8, 16)
    inner = 96 if kind == "Gemma3nTextConfig" else config.intermediate_size
    kept = 2 * 2 * 2 * sum(widths) * 70  # bytes a number, keys and values, heads; tokens
    row = kept + 2 * 50 * (4 * 32 + 3 * inner) + 16 * 100
    monkeypatch.setattr(memory, "available", lambda _: 2 * 33 * row)
    assert rows_that_fit(model, 50, 20) == 33


def test_this_machine_has_memory() -> None:
    """Reference: what is installed. A GPU's are asked of CUDA, and nothing is known of other devices."""
    found = available(CPU)
    if sys.platform != "linux":
        assert found is None
    else:
        assert found is not None
        assert 0 < found < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available(torch.device("meta")) is None
