"""Extraction and steering against the model's own hidden states and a hook written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers
from helpers.toys import adapter, by_hand, hooks_of, preset, runtime
from pydantic import ValidationError
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.config import ConfigError
from steer_heal.contexts import Contexts
from steer_heal.lm.activations import last_token_states
from steer_heal.lm.base import Base
from steer_heal.lm.hooks import steered
from steer_heal.lm.student import Student
from steer_heal.steer import extract
from steer_heal.steer.mean_diff import MeanDiff

PROMPTS = [tuple(range(10, 10 + n)) for n in (3, 11, 7, 1, 5, 8)]
CONTEXTS = Contexts(name="test", prompts=("a day at work", "hello", "what is it that people like about this"))
PERSONAS = ("You are glad.", "You are not sure about anything.")


def method(*layers: Any) -> MeanDiff:
    return MeanDiff(name="mean_diff", layers=layers)


def vector_at(*layers: int, seed: int = 0, d: int = 32) -> SteeringVector:
    directions = torch.randn(len(layers), d, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(layers=layers, directions=directions, snr=(1.0,) * len(layers))


@torch.no_grad()
def hidden_after(model: Any, ids: Sequence[int], block: int) -> Tensor:
    """The last token's state after a block, from transformers' own output of one unpadded prompt."""
    states = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    assert block < len(states) - 2, "transformers normalises the state after the last block"
    state: Tensor = states[block + 1][0, -1]
    return state


@contextmanager
def hooked(block: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A hook by hand on a block that returns a tensor."""
    handle = block.register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2), (2, 0)])
@pytest.mark.parametrize("score_batch", [1, 4, 100])
def test_tag_states(tiny: Base, layers: tuple[int, ...], score_batch: int) -> None:
    """Reference: output_hidden_states of each prompt alone, unpadded, at its last token, after the named blocks."""
    found = last_token_states(tiny, PROMPTS, layers, runtime(score_batch=score_batch))
    expected = torch.stack([torch.stack([hidden_after(tiny.model, ids, k) for k in layers]) for ids in PROMPTS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_extract_by_hand(tiny: Base) -> None:
    """Reference: the mean of differences of hidden states, and its signal over noise, context by context."""
    found = extract(method(1, 2), Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
    assert found.layers == (1, 2)
    for row, block in enumerate(found.layers):
        differences = torch.stack(
            [
                hidden_after(tiny.model, tiny.chat.prompt(PERSONAS[0], context), block)
                - hidden_after(tiny.model, tiny.chat.prompt(PERSONAS[1], context), block)
                for context in CONTEXTS.prompts
            ]
        )
        mean = differences.sum(0) / len(CONTEXTS.prompts)
        torch.testing.assert_close(found.directions[row], mean, atol=1e-5, rtol=0, msg=lambda m: f"block {block}: {m}")
        assert math.isclose(found.norms()[row], mean.norm(), rel_tol=1e-4), "not at raw scale"
        along = [float(one @ mean / mean.norm()) for one in differences]
        centre = sum(along) / len(along)
        spread = (sum((a - centre) ** 2 for a in along) / (len(along) - 1)) ** 0.5
        assert math.isclose(found.snr[row], float(mean.norm()) / spread, rel_tol=1e-3), f"snr {found.snr[row]}"


def test_swapped_personas_point_the_other_way(tiny: Base) -> None:
    """Reference: from the second persona to the first."""
    there, back = (
        extract(method(1), Student(tiny), p, CONTEXTS, runtime=runtime()) for p in (PERSONAS, PERSONAS[::-1])
    )
    torch.testing.assert_close(there.directions, -back.directions)
    assert math.isclose(there.cosine(back), -1, abs_tol=1e-5), f"cosine {there.cosine(back)}"


def test_extraction_is_from_the_current_student(tiny: Base) -> None:
    """Reference: hidden states of a copy of the base with the adapter added by hand."""
    student = Student(tiny).learn(adapter(tiny, 1, size=0.2))
    found = extract(method(2), student, PERSONAS, CONTEXTS, runtime=runtime()).directions[0]
    model = by_hand(student)
    expected = torch.stack(
        [
            hidden_after(model, tiny.chat.prompt(PERSONAS[0], c), 2)
            - hidden_after(model, tiny.chat.prompt(PERSONAS[1], c), 2)
            for c in CONTEXTS.prompts
        ]
    ).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    pristine = extract(method(2), Student(tiny), PERSONAS, CONTEXTS, runtime=runtime()).directions[0]
    assert (found - pristine).norm() > 0.1 * pristine.norm(), "this test could not tell the student from base"


def test_steering_adds_the_vector_at_every_position(tiny: Base) -> None:
    """Reference: two hooks by hand that add alpha times the direction, on logits of every position."""
    vector, ids = vector_at(1, 2), torch.tensor([PROMPTS[1]])
    with steered(tiny, vector, 0.7):
        ours = run(tiny.model, ids)
    one, two = tiny.model.model.layers[1], tiny.model.model.layers[2]
    with hooked(one, lambda h: h + 0.7 * vector.directions[0]), hooked(two, lambda h: h + 0.7 * vector.directions[1]):
        theirs = run(tiny.model, ids)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    moved = (ours - run(tiny.model, ids)).abs().amax(-1)[0]
    assert moved.min() > 1e-3, f"positions that steering leaves alone: {(moved <= 1e-3).nonzero().flatten().tolist()}"


def test_a_dose_of_one_adds_the_direction_as_it_is(tiny: Base) -> None:
    """Reference: the state after the block, before and after."""
    vector, ids = vector_at(1), torch.tensor([PROMPTS[1]])
    states: list[Tensor] = []

    def noting(h: Tensor) -> Tensor:
        states.append(h)
        return h

    for dose in (0.0, 1.0, -2.5):
        with steered(tiny, vector, dose), hooked(tiny.model.model.layers[1], noting):
            run(tiny.model, ids)
    for state, dose in zip(states[1:], (1.0, -2.5), strict=True):
        torch.testing.assert_close(
            state - states[0], (dose * vector.directions[0]).expand_as(state), atol=1e-5, rtol=0,
            msg=lambda m: f"dose {dose}: {m}",
        )  # fmt: skip


def test_no_vector_and_dose_0_change_nothing(tiny: Base) -> None:
    """Reference: the model's own logits, to the bit."""
    ids = torch.tensor([PROMPTS[1]])
    plain = run(tiny.model, ids)
    for vector, dose in ((None, 1.0), (vector_at(0, 3), 0.0), (vector_at(1), torch.zeros(1))):
        with steered(tiny, vector, dose):
            assert torch.equal(run(tiny.model, ids), plain), f"{vector and vector.layers} at dose {dose} changed logits"


def test_a_rows_coefficient_touches_no_other_row(tiny: Base) -> None:
    """Reference: each row's logits without steering, and steered alone at its own dose."""
    vector = vector_at(1, 3)
    ids = torch.arange(100, 140).reshape(4, 10)
    plain, doses = run(tiny.model, ids), torch.tensor([0.0, 0.8, 0.0, -1.5])
    with steered(tiny, vector, doses):
        together = run(tiny.model, ids)
    for row, dose in enumerate(doses.tolist()):
        if dose == 0:
            assert torch.equal(together[row], plain[row]), f"row {row} has dose 0 and changed"
        with steered(tiny, vector, dose):
            alone = run(tiny.model, ids[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0, msg=lambda m: f"row {row}: {m}")


def test_blocks_that_return_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: Bloom, whose blocks return tuples, with the hidden state changed by hand inside the tuple."""
    config = transformers.BloomConfig(vocab_size=200, hidden_size=16, n_layer=3, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = transformers.BloomForCausalLM(config).eval().requires_grad_(False)
    base = Base("bloom", lambda: (model, None))  # type: ignore[arg-type]
    monkeypatch.setitem(base.__dict__, "end_ids", frozenset({0}))
    monkeypatch.setattr(Base, "pad_id", 0)
    vector, ids, kinds = vector_at(1, d=16), torch.tensor([PROMPTS[1]]), []
    with steered(base, vector, 2.0):
        ours = run(model, ids)

    def add(module: Any, inputs: Any, output: Any) -> Any:
        kinds.append(type(output))
        return (output[0] + 2.0 * vector.directions[0], *output[1:])

    handle = model.transformer.h[1].register_forward_hook(add)
    theirs = run(model, ids)
    handle.remove()
    assert kinds == [tuple], f"this test needs a block that returns a tuple, not {kinds}"
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    expected = torch.stack([hidden_after(model, prompt, 1) for prompt in PROMPTS])
    torch.testing.assert_close(last_token_states(base, PROMPTS, [1], runtime())[:, 0], expected, atol=1e-5, rtol=0)


def test_hooks_are_gone_afterwards(tiny: Base) -> None:
    """Reference: the list of hooks before, also when an exception passes."""
    before = hooks_of(tiny.model)  # transformers leaves some of its own
    with steered(tiny, vector_at(0, 1), 1.0):
        assert hooks_of(tiny.model) != before, "this test does not see the hooks that steer"
    with pytest.raises(KeyError, match="inside"), steered(tiny, vector_at(0, 1), 1.0):
        raise KeyError("inside")
    assert hooks_of(tiny.model) == before, "steering left hooks behind"
    extract(method(0, 3), Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
    assert hooks_of(tiny.model) == before, "extraction left hooks behind"


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((0.4, 0.6), 30, range(12, 18)),
        ((0.0, 1.0), 4, range(4)),
        ((0, 1.0), 4, range(4)),
        ((0.5, 0.51), 4, range(2, 3)),
        ((0.58, 1.0), 50, range(29, 50)),  # 0.58 * 50 is 28.999999999999996
        ((0.0, 0.28), 25, range(7)),  # 0.28 * 25 is 7.000000000000001
        ((3, 5), 30, (3, 5)),  # two indices are no band
        ((0, 1), 30, (0, 1)),
        ((7,), 30, (7,)),
        ((1, 2, 9), 30, (1, 2, 9)),
        ((29,), 30, (29,)),
    ],
)
def test_layers(layers: tuple[float, ...], depth: int, expected: Sequence[int]) -> None:
    """Reference: floor and ceiling of the shares, by hand."""
    assert method(*layers).blocks(depth) == tuple(expected), f"steer.layers={list(layers)} of {depth} blocks"


def test_bands_in_hundredths_follow_exact_arithmetic() -> None:
    """Reference: floor and ceiling of fractions, without rounding errors, for many depths."""
    for depth in (1, 4, 12, 24, 25, 30, 32, 48, 50, 75, 80):
        for low in range(0, 100, 7):
            for high in range(low + 1, 101, 3):
                first = math.floor(Fraction(low, 100) * depth)
                expected = range(first, max(math.ceil(Fraction(high, 100) * depth), first + 1))
                found = method(low / 100, high / 100).blocks(depth)
                assert found == tuple(expected), f"[{low / 100}, {high / 100}] of {depth} blocks: {found}"


@pytest.mark.parametrize("layers", [(0.9, 0.2), (0.5, 1.7), (3, 3), (-1,), (), (0.5,), (0.1, 0.2, 0.3), (-0.1, 0.5)])
def test_refused_layers(layers: tuple[float, ...]) -> None:
    """Reference: a band needs 0 <= from < to <= 1, a list distinct indices from 0 up; said in one line."""
    with pytest.raises(ValidationError, match="indices of blocks") as refused:
        method(*layers)
    assert len(refused.value.errors()) == 1, f"{refused.value.error_count()} complaints about one value"


def test_refused_layers_are_named_as_on_the_command_line() -> None:
    """Reference: field, value and what is allowed, in the message that a user sees."""
    with pytest.raises(ConfigError, match=r"steer\.layers=.*0\.9.*must be a band"):
        preset("steer.layers=[0.9,0.2]")


def test_a_block_beyond_the_depth_is_refused_kindly(tiny: Base) -> None:
    """Reference: the message names the field, the value and the depth."""
    with pytest.raises(ConfigError, match=r"steer\.layers=\[1, 4\].*4 blocks"):
        extract(method(1, 4), Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
