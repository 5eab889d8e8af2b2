"""A base quantised to nf4: against a float model with the same weights dequantised, or refused in one line."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compose import composed
from helpers.folders import from_folder
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say
from helpers.toys import adapter, assert_alike, healed, hooks_of, logits_of, off, preset, regulariser, runtime
from torch import Tensor

from steer_heal.config import ConfigError
from steer_heal.generate import generate
from steer_heal.lm.base import Base
from steer_heal.lm.batch import Pair
from steer_heal.lm.score import score
from steer_heal.lm.student import Student, summable
from steer_heal.lora import Lora
from steer_heal.model import checksums

NF4 = ("model.quantization=nf4", "model.device=cpu")
IDS = tuple(range(20, 60))
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install '.[nf4]'"
)


@pytest.fixture(scope="module")
def folder(tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as `save_pretrained` leaves it."""
    place = tmp_path_factory.mktemp("nf4")
    tiny.model.save_pretrained(place)
    tiny.tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def nf4(folder: Path) -> Base:
    """The tiny model, quantised as it is loaded."""
    return from_folder(folder, *NF4)


@pytest.fixture(scope="module")
def dequantised(nf4: Base, tiny: Base) -> Base:
    """A float32 model that multiplies by the numbers that the 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    model = copy.deepcopy(tiny.model)
    for name, module in nf4.model.named_modules():
        if hasattr(module, "quant_state"):
            plain: Any = model.get_submodule(name)
            plain.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return Base("dequantised", lambda: (model, tiny.tokenizer))


def packed(model: Any) -> dict[str, Tensor]:
    """Every weight and every number that scales one, by name."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {
        f"{name}.absmax": m.weight.quant_state.absmax.clone()
        for name, m in model.named_modules()
        if hasattr(m, "quant_state")
    }


@installed
def test_the_blocks_are_in_4_bits_and_the_rest_as_it_was(nf4: Base, tiny: Base, dequantised: Base) -> None:
    """Reference: the weights before, and the logits of the dequantised model."""
    linear = {name: m for name, m in nf4.model.named_modules() if hasattr(m, "quant_state")}
    assert len(linear) == 4 * 7
    assert {m.weight.quant_state.quant_type for m in linear.values()} == {"nf4"}
    assert {m.compute_dtype for m in linear.values()} == {torch.float32}
    assert not any(summable(m) for m in linear.values())
    head = nf4.model.get_output_embeddings().weight
    assert torch.equal(head, tiny.model.get_output_embeddings().weight)
    assert nf4.model.dtype == torch.float32
    torch.testing.assert_close(logits_of(nf4.model, *IDS), logits_of(dequantised.model, *IDS), atol=1e-4, rtol=0)
    off = (logits_of(nf4.model, *IDS) - logits_of(tiny.model, *IDS)).abs().max()
    assert off > 1e-3, f"quantising moved logits by {off} only"


@installed
@pytest.mark.parametrize("c", [1.0, 0.5])
def test_a_view_adds_what_was_learned(nf4: Base, dequantised: Base, c: float) -> None:
    """Reference: the dense view of the dequantised model; and every number of the base before."""
    before, history = packed(nf4.model), (adapter(nf4, 1), adapter(nf4, 2, r=5, alpha=7.5))
    with Student(dequantised, history, c).view() as model:
        expected = logits_of(model, *IDS)
    with Student(nf4, history, c).view() as model:
        found = logits_of(model, *IDS)
    assert (expected - logits_of(dequantised.model, *IDS)).abs().max() > 0.1, "the adapters change nothing"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    after = packed(nf4.model)
    assert after.keys() == before.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert hooks_of(nf4.model) == {}


@installed
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_heal_learns_what_it_learns_on_the_dequantised_model(nf4: Base, dequantised: Base, rounds: int) -> None:
    """Reference: the same heal on floats. Gradients must pass 4-bit layers that have run without any before."""
    history = (adapter(nf4, 1), adapter(nf4, 2, r=5, alpha=7.5))[:rounds]
    expected, found = (healed(Student(base, history), regulariser("kl_rev")) for base in (dequantised, nf4))
    assert_alike(expected, found, "floats and nf4")
    assert off(found) < 1e-4
    assert float(found.summary["state_change"]) > 0.01


@installed
def test_bfloat16_runs_through_all_that_a_round_does(folder: Path) -> None:
    """Reference: finite figures in the dtype asked for; the values are those of the tests above."""
    base = from_folder(folder, *NF4, "model.dtype=bfloat16")
    student = Student(base, (adapter(base, 1),))
    learned = healed(student, regulariser("kl_rev"))
    assert off(learned) < 0.05, "relative to the states"
    exp = preset()
    answers = generate(exp.generate, student.learn(learned), "Be", ["Who?"], None, [0.0], 0, runtime=runtime())
    assert all(row.ids for row in answers.rows)
    with student.view() as model:
        (values,) = score(model, [Pair(IDS[:5], IDS[5:])], pad_id=base.pad_id, micro_batch=1)
        assert logits_of(model, *IDS).dtype == torch.bfloat16
    assert bool(values.isfinite().all())


@installed
def test_target_modules_are_found_in_a_quantised_model(nf4: Base) -> None:
    """Reference: names that the float model has, and one that is not a linear layer inside the blocks."""
    Lora(name="test", r=2, lora_alpha=None, target_modules=("q_proj", "down_proj"), first=0).check_model(nf4.model)
    with pytest.raises(ConfigError, match="lm_head is not a linear layer inside the blocks"):
        Lora(name="test", r=2, lora_alpha=None, target_modules=("lm_head",), first=0).check_model(nf4.model)


@installed
def test_a_model_that_is_quantised_already_is_not_quantised_again(nf4: Base, tiny: Base, tmp_path: Path) -> None:
    """A quantised checkpoint loads unchanged. Reference: the logits of the model that was saved."""
    nf4.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model.quantization='nf4': model.id=.* is quantised already"):
        from_folder(tmp_path, *NF4)
    again = from_folder(tmp_path, "model.device=cpu")
    torch.testing.assert_close(logits_of(again.model, *IDS), logits_of(nf4.model, *IDS), atol=1e-4, rtol=0)


@installed
def test_quantised_is_another_model_to_the_store(nf4: Base, folder: Path) -> None:
    assert nf4.fingerprint != from_folder(folder, "model.device=cpu").fingerprint


def test_a_model_that_is_not_quantised_keeps_its_keys(folder: Path) -> None:
    """Reference: fingerprint and key fields of a model without the field."""
    model = composed("model=hub", f"model.id={folder}").model
    assert model.identity() == hashlib.sha256(repr(sorted(checksums(folder).items())).encode()).hexdigest()
    fields = {"id", "revision", "chat_template", "dtype", "device", "attn_implementation"}
    assert set(model.key_fields()) == fields
    assert set(composed("model=hub", f"model.id={folder}", *NF4).model.key_fields()) == fields | {"quantization"}


def test_nf4_needs_its_library(say: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported before the model is looked for, on this machine or for another."""
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    wanted = ("model.quantization='nf4'", "needs bitsandbytes", "pip install 'steer_heal[nf4]'")
    say("model=hub model.id=nobody/nothing model.quantization=nf4").refused(*wanted)
    say("-m model=hub model.id=nobody/nothing model.quantization=nf4 seed=0,1").refused(*wanted)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        composed("model=hub", "model.id=nobody/nothing", *NF4).prepare(here=False)


def test_nf4_needs_a_device_that_can(say: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library that fails like one without its compiled part."""

    class Broken:
        class functional:
            @staticmethod
            def quantize_4bit(*_: Any, **__: Any) -> None:
                raise RuntimeError("no native\nlibrary")

    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", Broken)
    line = say("model=hub model.id=nobody/nothing model.device=cpu model.quantization=nf4").refused(
        "model.quantization='nf4'", "cannot quantise on cpu", "another model.device"
    )
    assert line.endswith("no native library")


def test_other_quantizations_are_refused(say: Callable[[str], Said]) -> None:
    say("model=hub model.id=nobody/nothing model.quantization=int8").refused("model.quantization='int8'", "must be")
