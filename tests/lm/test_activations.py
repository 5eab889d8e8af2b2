"""States at the assistant tag in many families, against a plain pass of every prompt alone; and what does not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.families import GROUPED, ODD, PLAIN, V, built, family, ids
from helpers.toys import hooks_of, runtime
from test_prefix import passes
from torch import Tensor
from transformers import PreTrainedModel

from steer_heal.config import ConfigError
from steer_heal.lm.activations import last_token_states
from steer_heal.lm.base import Base, blocks_of
from steer_heal.lm.batch import MIN_PREFIX

Prompts = Sequence[tuple[int, ...]]
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
DEEP: dict[str, tuple[str, dict[str, Any]]] = {  # six blocks, so that there are some above and between
    "llama": ("LlamaConfig", {**GROUPED, "num_hidden_layers": 6}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "num_hidden_layers": 6, "head_dim": 4, "sliding_window": 5,
                                    "layer_types": KINDS}),
    "full_first": ("Qwen2Config", {**GROUPED, "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 5,
                                   "layer_types": KINDS[::-1]}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 6, "n_head": 4, "n_positions": 400, "vocab_size": V}),
}  # fmt: skip


def alike(prefix: int, tails: Sequence[int] = (3, 1, 6, 2)) -> Prompts:
    """Prompts that begin with the same tokens and go on for so many others."""
    return [ids(prefix, 1000) + ids(tail, 7 + i) for i, tail in enumerate(tails)]


@pytest.fixture(autouse=True)
def _pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models have no tokenizer; a padding token that means something shows whether it is looked at."""
    monkeypatch.setattr(Base, "pad_id", 7)


def as_base(model: PreTrainedModel) -> Base:
    return Base("family", lambda: (model, None))


def deep(name: str) -> Base:
    kind, fields = DEEP[name]
    return as_base(built(kind, **fields))


@torch.no_grad()
def alone(base: Base, prompts: Prompts, layers: Sequence[int]) -> Tensor:
    """States [c, l, d] of each prompt run by itself, unpadded, its whole way up, looked at by hooks of our own."""
    found: dict[tuple[int, int], Tensor] = {}
    for i, prompt in enumerate(prompts):

        def look(_block: Any, _inputs: Any, output: Any, *, key: tuple[int, int]) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            found[key] = hidden[0, -1].clone()

        hooks = [
            base.blocks[layer].register_forward_hook(lambda *seen, key=(i, layer), look=look: look(*seen, key=key))
            for layer in set(layers)
        ]
        base.model.base_model(input_ids=torch.tensor([prompt]), use_cache=False)
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.stack([found[i, layer] for layer in layers]) for i in range(len(prompts))])


def assert_alone(base: Base, prompts: Prompts, layers: Sequence[int], what: str, **sizes: int) -> None:
    found = last_token_states(base, prompts, layers, runtime(**sizes))
    expected = alone(base, prompts, layers)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * size, rtol=1e-4, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("layers", [(0,), (1,), (1, 0)])
@pytest.mark.parametrize("name", [*PLAIN, *ODD])
def test_families(name: str, layers: tuple[int, ...]) -> None:
    """Reference: every prompt alone; also for what keeps no keys and values, where nothing can be shared."""
    base = as_base(family(name))
    assert_alone(base, alike(13), layers, f"{name}, blocks {layers}")


@pytest.mark.parametrize("layers", [(0,), (2,), (5,), (1, 2, 3), (5, 0, 3), (4, 1), tuple(range(6))])
@pytest.mark.parametrize("name", DEEP)
def test_layers_of_deeper_models(name: str, layers: tuple[int, ...]) -> None:
    """Reference: every prompt alone; the beginning is longer than the windows, and kinds of attention take turns."""
    assert_alone(deep(name), alike(13), layers, f"{name}, blocks {layers}")


PROMPTS: dict[str, Prompts] = {
    "equal": [ids(9, 3)] * 4,
    "equal but for one": [*[ids(9, 3)] * 3, (*ids(8, 3), 5)],
    "one": [ids(9, 3)],
    "one of one token": [(4,)],
    "of one token": [(4,), (9,), (4,)],
    "of one token among others": [*alike(13), ids(1, 1000)],
    "that share nothing": [ids(5, 1), ids(9, 2), ids(7, 3)],
    "that share less than is worth it": alike(MIN_PREFIX - 1),
    "that share just enough": alike(MIN_PREFIX),
    "that others begin with": [ids(9, 3), (*ids(9, 3), 4, 5, 6), ids(6, 3), (*ids(9, 3), 4)],
    "longer than a window many times": alike(60, (3, 30, 1)),
}


@pytest.mark.parametrize("score_batch", [1, 2, 100])
@pytest.mark.parametrize("what", PROMPTS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_prompts(name: str, what: str, score_batch: int) -> None:
    """Reference: every prompt alone, in whatever batches they come."""
    base = as_base(family(name))
    assert_alone(base, PROMPTS[what], (1, 0), f"{name}, prompts {what}", score_batch=score_batch)


@contextmanager
def calls(base: Base) -> Iterator[Counter[int]]:
    """Number of times that each block has run."""
    seen: Counter[int] = Counter()
    hooks = [block.register_forward_pre_hook(lambda *_, k=k: seen.update([k])) for k, block in enumerate(base.blocks)]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("prefix", [13, MIN_PREFIX - 1])
@pytest.mark.parametrize("layers", [(0,), (3, 1), (5,)])
@pytest.mark.parametrize("name", DEEP)
def test_blocks_above_do_not_run(name: str, layers: tuple[int, ...], prefix: int) -> None:
    """Reference: the number of batches, twice where what they begin with is run first; and none above."""
    base, prompts = deep(name), alike(prefix)
    for score_batch, batches in ((2, 2), (4, 1)):
        with calls(base) as ran, passes(base.model) as seen:
            last_token_states(base, prompts, layers, runtime(score_batch=score_batch))
        each = batches * (2 if prefix >= MIN_PREFIX else 1)
        assert ran == dict.fromkeys(range(max(layers) + 1), each), f"{name}: {dict(ran)}"
        assert len(seen) == each


def test_the_beginning_is_run_once() -> None:
    """Reference: the shapes of what goes through the body: one row of the beginning, then what is left of all."""
    base = as_base(family("llama"))
    with passes(base.model) as seen:
        last_token_states(base, alike(13), (1,), runtime(score_batch=4))
    assert seen == [(1, 13), (4, 6)]
    with passes(base.model) as seen:
        last_token_states(base, alike(13), (1,), runtime(score_batch=1))
    assert seen == [(1, 19), (1, 16), (1, 15), (1, 14)], "a single text shares nothing"


@pytest.mark.parametrize("name", [*PLAIN, *ODD])
def test_the_model_is_as_before(name: str) -> None:
    """Reference: hooks, logits and hidden states before a pass that ended half way up; what was asked comes again."""
    base = as_base(family(name))
    given = torch.tensor([ids(9, 3)])

    @torch.no_grad()
    def out() -> list[Tensor]:
        made = base.model(input_ids=given, use_cache=False, output_hidden_states=True)
        return [made.logits, *made.hidden_states]

    before, hooks = out(), hooks_of(base.model)
    first = last_token_states(base, alike(13), (0,), runtime())
    assert hooks_of(base.model) == hooks
    after = out()
    assert len(after) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(last_token_states(base, alike(13), (0,), runtime()), first)


@pytest.mark.parametrize(("fails_at", "prefix"), [(1, 13), (2, 13), (1, 0)])
def test_hooks_are_gone_after_an_error(fails_at: int, prefix: int) -> None:
    """Reference: the list of hooks before; the pass of the beginning fails, or that of the rest."""
    base = deep("llama")
    before, runs = hooks_of(base.model), Counter[str]()

    def fail(*_: Any) -> None:
        runs.update(["run"])
        if runs["run"] == fails_at:
            raise MemoryError("full")

    handle = base.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="full"):
        last_token_states(base, alike(prefix), (0, 2), runtime())
    handle.remove()
    assert hooks_of(base.model) == before
    assert blocks_of(base.model) is base.blocks
    assert_alone(base, alike(prefix), (0, 2), "after an error")


def test_a_block_that_text_does_not_run_through_is_named() -> None:
    """A stand-in for the cross-attention blocks of some multimodal models."""
    base = deep("llama")
    vars(base)["blocks"] = torch.nn.ModuleList([*base.blocks, torch.nn.Identity()])
    with pytest.raises(ConfigError, match=r"blocks \[6\] of LlamaForCausalLM do not run on text alone"):
        last_token_states(base, alike(6), [5, 6], runtime())
    assert not hooks_of(base.model)
