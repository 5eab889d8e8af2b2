"""Decoding side by side against transformers' own greedy `generate`, one unpadded row at a time, in many families."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.families import ODD, PLAIN, SIZE, WRAPPED, V, built, family, ids
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.generate import Kept
from steer_heal.lm.base import Base, head
from steer_heal.lm.decode import _sound, decode
from steer_heal.model.tiny import tiny_tokenizer

NEW = 9
PROMPTS = [ids(n, 31 * n) for n in (4, 11, 1, 7, 6)]
NOTHING = torch.zeros(len(PROMPTS))
DOSES = torch.tensor([0.0, 2.0, -1.5, 4.0, 0.0])
VECTOR = SteeringVector(layers=(1,), directions=torch.linspace(-9, 9, SIZE["hidden_size"])[None], snr=(1.0,))
FAMILIES = sorted(PLAIN | ODD | WRAPPED)


def base_of(name: str, ends: Sequence[int] = ()) -> Base:
    """A base of a family whose turns end with any of `ends`."""
    model: Any = copy.copy(family(name))
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = list(ends)
    base = Base("test", lambda: (model, tiny_tokenizer()))
    vars(base).update(end_ids=frozenset(ends), pad_id=0)  # the random ids of a family are no words of a tokenizer
    return base


def likeliest(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    return logits.argmax(-1)


def decoded(base: Base, doses: Tensor = NOTHING, vector: SteeringVector | None = VECTOR) -> list[tuple[int, ...]]:
    return decode(base, PROMPTS, vector, doses, likeliest, NEW, lambda steps: None)


@pytest.mark.parametrize("narrow", [16, 8])
def test_what_is_kept_predicted_the_ids(narrow: int) -> None:
    """Reference: the head on the states kept; those of some models are narrower than their blocks'."""
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
    model = built("OPTConfig", **sizes, word_embed_proj_dim=narrow, max_position_embeddings=100)
    base = Base("test", lambda: (model, tiny_tokenizer()))
    vars(base).update(end_ids=frozenset(), pad_id=0)
    vars(base)["end_ids"] = frozenset({decoded(base, vector=None)[0][2]})  # the first row ends early
    kept = Kept(len(PROMPTS), NEW)
    said = decode(base, PROMPTS, None, NOTHING, likeliest, NEW, lambda steps: None, keep=kept)
    assert len(said[0]) <= 3
    for row, states in zip(said, kept.of(map(len, said)), strict=True):
        assert states.shape == (len(row), narrow)
        assert tuple(head(model, states).argmax(-1).tolist()) == row


def alone(base: Base, prompt: tuple[int, ...], dose: float, ends: Sequence[int] = ()) -> tuple[int, ...]:
    """Transformers' own greedy continuation, steered by a hook by hand."""

    def shifted(_module: Any, _inputs: Any, out: Any) -> Any:
        shift = dose * VECTOR.directions[0]
        return type(out)((out[0] + shift, *out[1:])) if isinstance(out, tuple | list) else out + shift

    hook = base.blocks[1].register_forward_hook(shifted)
    model: Any = base.model
    given = torch.tensor([prompt])
    try:
        out = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW,
            eos_token_id=list(ends) or None, pad_token_id=0,
        )  # fmt: skip
    finally:
        hook.remove()
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_says_what_it_says_alone(name: str) -> None:
    """Rows of other lengths and doses beside it, padding and buffers change nothing."""
    base = base_of(name)
    plain, steered = decoded(base), decoded(base, DOSES)
    expected = [alone(base, prompt, 0.0) for prompt in PROMPTS]
    assert plain == expected, "without steering"
    expected = [alone(base, prompt, float(dose)) for prompt, dose in zip(PROMPTS, DOSES, strict=True)]
    assert steered == expected, "with a dose of its own for every row"
    assert [one == two for one, two in zip(plain, steered, strict=True)] != [True] * 5, "no dose changed anything"


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_have_ended_leave(name: str) -> None:
    """Those that stay still say what they say alone, and several tokens end a turn."""
    ends = range(0, V, 4)
    base, widths = base_of(name, ends), []
    hook = base.model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: widths.append(len(args[0])))
    try:
        steered = decoded(base, DOSES)
    finally:
        hook.remove()
    expected = [alone(base, p, float(dose), ends) for p, dose in zip(PROMPTS, DOSES, strict=True)]
    assert steered == expected
    if sum(len(row) < max(map(len, steered)) for row in steered) > 1:
        assert widths[-1] < max(widths), f"rows in each pass of the head: {widths}"


@pytest.mark.parametrize("name", ["no_cache", "own_cache"])
def test_a_model_without_a_cache_of_the_usual_kind_says_what_it_says_alone(name: str, warnings: list[str]) -> None:
    """Reference: transformers' own `generate`; GPT-1 has no cache, and MiniMax accepts only one of its own class."""
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 8}
    model = family(name) if name == "no_cache" else built("MiniMaxConfig", **SIZE, **layers, num_key_value_heads=2)
    _sound.pop(model, None)
    base = Base(name, lambda: (model, base_of("llama").tokenizer))
    assert decoded(base, vector=None) == [alone(base, prompt, 0.0) for prompt in PROMPTS]
    decoded(base, vector=None)
    assert [line for line in warnings if "without a cache" in line] == [
        f"{type(model).__name__} is decoded without a cache, which is slow: it has none that works"
    ]
