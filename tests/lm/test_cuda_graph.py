"""Steps that are recorded once and replayed, recorded here without a GPU: torch's operations, and nothing of Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers.families import family
from test_decode import DOSES, FAMILIES, NEW, NOTHING, PROMPTS, V, alone, base_of, decoded, likeliest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from steer_heal.lm import decode
from steer_heal.lm.cuda_graph import recorded
from steer_heal.lm.kv_cache import fixed

WAITS = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "item", "unique")


class Taped(TorchDispatchMode):
    """A stand-in for a CUDA graph of some work: the same operations on the same tensors, without running Python."""

    made: ClassVar[list[Taped]] = []

    def __init__(self, work: Callable[[], Tensor], changes: Sequence[Tensor]) -> None:
        super().__init__()
        before = [tensor.clone() for tensor in changes]
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        with self:
            self.result = work()
        for tensor, value in zip(changes, before, strict=True):
            tensor.copy_(value)
        Taped.made.append(self)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.tape.append((op, args, kwargs or {}, out))
        return out

    def __call__(self) -> Tensor:
        self.replays += 1
        now: dict[
            int, Tensor
        ] = {}  # what stands for a tensor of the recording; those from outside stand for themselves
        for op, args, kwargs, out in self.tape:
            args, kwargs = tree_map_only(Tensor, lambda t: now.get(id(t), t), (args, kwargs))
            new = op(*args, **kwargs)
            for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor):
                    now[id(old)] = fresh
        return now[id(self.result)]


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Taped]:
    """The steps recorded in a test, by a recorder that needs no GPU."""

    def forward(model: Any, room: int, graphs: bool) -> decode._Forward:
        cache = fixed(model, room) if model._can_compile_fullgraph else None
        return decode._Forward(model, room) if cache is None else decode._Replayed(model, room, cache)

    Taped.made = []
    monkeypatch.setattr(decode, "recorded", Taped)
    monkeypatch.setattr(decode, "_forward", forward)
    return Taped.made


RECORDED = [name for name in FAMILIES if family(name)._can_compile_fullgraph and fixed(family(name), 9) is not None]


def test_the_families_of_most_models_are_recorded() -> None:
    """The exceptions are blocks that keep more than keys and values, and those that branch on values."""
    assert sorted(set(FAMILIES) - set(RECORDED)) == [
        "hybrid", "keys_and_states", "mamba", "mask_a_head", "no_cache", "selected_keys",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_replayed_steps_say_what_each_row_says_alone(name: str, taped: list[Taped]) -> None:
    base = base_of(name)
    plain, steered = decoded(base), decoded(base, DOSES)
    assert plain == [alone(base, prompt, 0.0) for prompt in PROMPTS], "without steering"
    expected = [alone(base, prompt, float(dose)) for prompt, dose in zip(PROMPTS, DOSES, strict=True)]
    assert steered == expected, "with a dose of its own for every row"
    assert [one.replays for one in taped] == [NEW - 1, NEW - 1], "one recording a call, replayed at every step"
    waits = [str(op) for op, *_ in taped[0].tape if any(word in str(op) for word in WAITS)]
    assert not waits, "the host waits for the device"


@pytest.mark.parametrize("name", RECORDED)
def test_rows_that_leave_have_the_step_recorded_again(name: str, taped: list[Taped]) -> None:
    ends = range(0, V, 4)
    base = base_of(name, ends)
    steered = decoded(base, DOSES)
    assert steered == [alone(base, p, float(dose), ends) for p, dose in zip(PROMPTS, DOSES, strict=True)]


def test_prompts_of_one_length_need_no_padding(taped: list[Taped]) -> None:
    """Without padding, some attention takes another path."""
    base, prompts = base_of("llama"), [PROMPTS[3], PROMPTS[3][::-1]]
    said = decode.decode(base, prompts, None, NOTHING[:2], likeliest, NEW, lambda steps: None)
    assert said == [alone(base, prompt, 0.0) for prompt in prompts]
    assert len(taped) == 1


def test_only_a_gpu_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = copy.copy(family("llama"))
    assert type(decode._forward(model, 9, True)) is decode._Forward
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert type(decode._forward(model, 9, True)) is decode._Replayed
    assert type(decode._forward(model, 9, False)) is decode._Forward
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert type(decode._forward(model, 9, True)) is decode._Forward


class Counting:
    """Work that hands a number on, beside a device that only pretends to be one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.runs, self.lies, self.fails = torch.zeros(1), 0, 0.0, ""
        cuda = {
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.result.copy_(self.step() + self.lies)),
            "graph": self.capture, "Stream": self.stream, "current_stream": self.stream, "stream": nullcontext,
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": self.mode,
        }  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.modes: list[Any] = []

    def stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def mode(self, mode: Any) -> None:
        self.modes.append(mode)

    @contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        before = self.number.clone()
        yield
        self.number.copy_(before)  # what is captured is not carried out

    def step(self) -> Tensor:
        self.number.add_(1)
        return 2 * self.number

    def __call__(self) -> Tensor:
        self.runs += 1
        self.result = self.step()
        if self.fails:
            raise RuntimeError(self.fails)
        return self.result


def test_what_is_recorded_goes_on_where_the_work_was(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Counting(monkeypatch)
    replayed = recorded(work, [work.number])
    assert work.number.item() == 0, "recording changes nothing"
    runs = work.runs
    assert [replayed().item() for _ in range(3)] == [2, 4, 6]
    assert work.runs == runs, "a replay runs no Python"
    assert work.modes == ["error", 0]


def test_work_that_waits_for_the_device_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    work = Counting(monkeypatch)
    work.fails = "called a synchronizing CUDA operation"
    assert recorded(work, [work.number]) is work
    assert work.number.item() == 0
    assert work.modes == ["error", 0]
    assert len(warnings) == 1
    assert "no CUDA graph" in warnings[0]


def test_other_failures_of_the_work_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Counting(monkeypatch)
    work.fails = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        recorded(work, [work.number])
    assert work.modes == ["error", 0]


def test_a_graph_that_says_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Counting(monkeypatch)
    work.lies = 0.1
    with pytest.raises(RuntimeError, match=r"runtime\.cuda_graphs=false"):
        recorded(work, [work.number])
