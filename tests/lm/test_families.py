"""Tiny models of many families, taken by structure: what is steered, extracted, decoded and adapted in each.

References name the blocks of each family by their path, and never ask steer_heal where they are.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers.families import BLOCKS, LATENT, SIZE, WRAPPED, built, family, ids, taller
from helpers.toys import assert_untouched, lora, runtime, snapshot
from torch import Tensor, nn
from transformers import BartConfig

from steer_heal.artifacts import SteeringVector
from steer_heal.config import ConfigError
from steer_heal.heal.chunked_nll import positions
from steer_heal.lm.activations import last_token_states
from steer_heal.lm.base import Base, blocks_of, check_blocks
from steer_heal.lm.decode import decode
from steer_heal.lm.hooks import steered
from steer_heal.lora import factors, live_adapter
from steer_heal.model import maker
from steer_heal.model.tiny import tiny_tokenizer
from steer_heal.reg.kl_rev import KlRev

D = SIZE["hidden_size"]
LAYER = 1  # of four blocks, so that the states after it are no normed last ones
VECTOR = SteeringVector(layers=(LAYER,), directions=torch.linspace(-3, 3, D)[None], snr=(1.0,))
KL = KlRev(name="kl_rev", lam=1.0, tau=0.0)
ROWS = torch.tensor([ids(7, 1), ids(7, 2), ids(7, 3)])
every_family = pytest.mark.parametrize("name", BLOCKS)


@functools.cache
def base_of(name: str) -> Base:
    model: Any = taller(name)
    return Base(name, lambda: (model, tiny_tokenizer()))


def path_of(name: str) -> nn.ModuleList:
    blocks = base_of(name).model.get_submodule(BLOCKS[name])
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@torch.no_grad()
def logits(name: str, dose: Any = None, rows: Tensor = ROWS) -> Tensor:
    """Of all rows side by side, steered where a dose is given."""
    base = base_of(name)
    with steered(base, None if dose is None else VECTOR, 0.0 if dose is None else torch.tensor(dose)):
        found: Tensor = base.model(input_ids=rows).logits
    return found


@every_family
def test_the_blocks_are_those_that_text_runs_through(name: str) -> None:
    """Reference: the family's own path; a wrapper has towers of as many blocks, and they come first."""
    model = base_of(name).model
    assert blocks_of(model) is path_of(name), f"{name}: other blocks than {BLOCKS[name]}"
    if name in WRAPPED:
        first = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
        assert first is not path_of(name), f"{name}: no tower to be mistaken for the blocks"


@every_family
def test_a_dose_of_0_changes_nothing(name: str) -> None:
    """Reference: the model without steering, to the bit."""
    plain = logits(name)
    for dose in (0.0, [0.0, 0.0, 0.0]):
        assert torch.equal(logits(name, dose), plain), f"{name}: a dose of {dose} changes logits"


@every_family
def test_a_dose_of_one_row_touches_no_other(name: str) -> None:
    """Reference: the same rows without steering, to the bit: they run side by side either way."""
    plain, found = logits(name), logits(name, [0.0, 2.0, 0.0])
    moved = [i for i in range(len(ROWS)) if not torch.equal(found[i], plain[i])]
    assert moved == [1], f"{name}: a dose of row 1 changes rows {moved}"


@every_family
def test_steering_is_adding_the_vector_by_hand(name: str) -> None:
    """Reference: the vector added to what enters the next block, at every position; other doses a row."""
    doses, shown = [1.0, -0.5, 2.0], dict[str, Tensor]()
    shift = torch.tensor(doses)[:, None, None] * VECTOR.directions[0]
    after, following = path_of(name)[LAYER], path_of(name)[LAYER + 1]
    with following.register_forward_pre_hook(lambda _m, given: (given[0] + shift, *given[1:])):
        expected = logits(name)
    plain_hook = after.register_forward_hook(lambda _m, _i, out: shown.update(plain=_first(out)))
    with plain_hook:
        plain = logits(name)
    with following.register_forward_pre_hook(lambda _m, given: shown.update(steered=given[0])):
        found = logits(name, doses)
    moved = shown["steered"] - shown["plain"]
    size = float(shown["plain"].abs().max())
    torch.testing.assert_close(
        moved, shift.expand_as(moved), atol=1e-6 * size, rtol=1e-5, msg=lambda m: f"{name}, states: {m}"
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}, logits: {m}")
    assert float((found - plain).abs().max()) > 1e-2, f"{name}: the vector moves nothing, so this test sees nothing"


def _first(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states.clone()


@pytest.mark.parametrize("shared", [0, 11])
@every_family
def test_extraction_reads_the_last_token_of_each_prompt(name: str, shared: int) -> None:
    """Reference: transformers' own hidden states of each prompt alone and unpadded; layers in any order."""
    base, layers = base_of(name), (2, LAYER)
    prompts = [ids(shared, 15) + ids(n, n) for n in (3, 9, 1, 6)]
    found = last_token_states(base, prompts, layers, runtime(score_batch=3))
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            shown = base.model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for j, layer in enumerate(layers):
            expected = shown[layer + 1][0, -1]  # the first are the embeddings
            torch.testing.assert_close(
                found[i, j], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4,
                msg=lambda m: f"{name}, prompt of {len(prompt)} tokens, block {layer}: {m}",
            )  # fmt: skip


@every_family
def test_decoding_sees_the_models_own_logits(name: str) -> None:
    """Reference: the model itself on the whole of each row; soft caps and scales are part of it (gemma2 has one)."""
    prompts, seen = [ids(n, n) for n in (3, 9, 6)], list[tuple[int, int, Tensor]]()

    def likeliest(values: Tensor, rows: Tensor, step: int) -> Tensor:
        seen.extend((i, step, values[k]) for k, i in enumerate(rows.tolist()))
        return values.argmax(-1)

    said = decode(base_of(name), prompts, None, torch.zeros(3), likeliest, 3, lambda steps: None)
    assert len(seen) > len(prompts), f"{name}: nobody said a second word"
    for i, step, values in seen:
        expected = logits(name, rows=torch.tensor([[*prompts[i], *said[i][:step]]]))[0, -1]
        torch.testing.assert_close(
            values, expected, atol=1e-4, rtol=1e-4, msg=lambda m: f"{name}, row {i}, step {step}: {m}"
        )


@every_family
def test_adapters_are_where_text_runs_and_all_of_them_learn(name: str) -> None:
    """Reference: the family's path, and gradients of a step: a tower's layer would get none."""
    base, place = base_of(name), BLOCKS[name].rpartition(".")[0]
    model, before = base.model, snapshot(base.model)
    with live_adapter(lora(2), model, 0) as wrapped:
        adapted = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        hidden = model.base_model(input_ids=ROWS).last_hidden_state[:, 2:].flatten(0, 1)
        found = positions(model, hidden, hidden.detach(), torch.arange(len(hidden)), KL, 5)
        found.nll.sum().backward()
        outside = [n for n in adapted if not n.startswith(f"base_model.model.{place}.")]
        assert not outside, f"{name}: adapters outside {place}: {outside[:3]}"
        idle = [n for n, p in adapted.items() if p.grad is None or ("lora_B" in n and not p.grad.any())]
        assert not idle, f"{name}: adapters without a gradient: {idle[:3]}"
        blocks = {n.split(f"{BLOCKS[name]}.")[1].split(".")[0] for n in adapted if BLOCKS[name] in n}
        assert blocks == {"0", "1", "2", "3"}, f"{name}: adapters in blocks {sorted(blocks)}"
    assert_untouched(model, before)


@pytest.mark.parametrize("first", [0, 0.5])
def test_a_target_beside_the_text_is_refused(first: float) -> None:
    """Reference: Gemma's tower has an fc1, its language model has none."""
    with pytest.raises(ConfigError, match="fc1 is not a module that text runs through; there are down_proj"):
        lora(2, targets=("q_proj", "fc1"), first=first).check_model(family("gemma3_wrapped"))


EXPERTS = {**SIZE, "num_key_value_heads": 4, "moe_intermediate_size": 4, "num_experts_per_tok": 2}
ROUTED = {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


def test_stacked_experts_are_left_alone() -> None:
    """Reference: adapters of attention only; DeepSeek's dense layers PEFT takes for experts, by their names."""
    for model in (built("Qwen3MoeConfig", **EXPERTS, num_experts=4), built("DeepseekV3Config", **ROUTED)):
        before = snapshot(model)
        with live_adapter(lora(2), model, 0) as wrapped:
            others = [name for name in factors(wrapped) if ".self_attn." not in name]
        assert not others, f"{type(model).__name__}: adapters of {others[:3]}"
        assert_untouched(model, before)


def test_what_gets_no_adapter_is_told(warnings: list[str]) -> None:
    lora(2).check_fits(built("DeepseekV3Config", **ROUTED))
    (line,) = warnings
    for part in (
        "some layers of DeepseekV3ForCausalLM",
        "gate_proj: PEFT",
        "stacked experts (experts.down_proj, experts.gate_up_proj)",
    ):
        assert part in line


def test_what_cannot_have_an_adapter_is_refused_by_name(warnings: list[str]) -> None:
    """Falcon H1's `out_proj` PEFT refuses; among all linear layers it is left out."""
    model = family("keys_and_states")
    with pytest.raises(
        ConfigError,
        match=r"target_modules=\[q_proj,out_proj\] is not allowed.*PEFT refuses it: .*out_proj.*; there are .*in_proj",
    ):
        lora(2, targets=("q_proj", "out_proj")).check_fits(model)
    lora(2).check_fits(model)
    with live_adapter(lora(2), model, 0) as wrapped:
        assert not [name for name in factors(wrapped) if "out_proj" in name]
    assert any("out_proj: PEFT refuses it" in line for line in warnings)


SPREAD = {
    **SIZE, "num_key_value_heads": 2, "head_dim": 4, "num_kv_shared_layers": 0, "laurel_rank": 2,
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": SIZE["vocab_size"],
    "activation_sparsity_pattern": None, "layer_types": ["full_attention"] * 2,
}  # fmt: skip
ODD_BLOCKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "several states a token": ("Gemma3nTextConfig", SPREAD, r"pass on \[4, 2, 3, 16\], not states \[2, 3, 16\]"),
    "looking ahead": ("BertConfig", SIZE, "looks ahead"),
}


@pytest.mark.parametrize("what", ODD_BLOCKS)
def test_what_cannot_be_steered_or_batched_is_refused(what: str) -> None:
    kind, fields, said = ODD_BLOCKS[what]
    with pytest.raises(ConfigError, match=said):
        check_blocks(built(kind, **fields))


def test_an_encoder_with_a_decoder_is_no_causal_language_model() -> None:
    with pytest.raises(ConfigError, match="a bart is not a causal language model"):
        maker(BartConfig())
