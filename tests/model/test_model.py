"""The tiny model, fingerprints of bases, chat templates, and the device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compose import composed
from helpers.folders import RAISING, edit_json, from_folder
from tokenizers.processors import TemplateProcessing

from steer_heal import model as model_options
from steer_heal.config import ConfigError
from steer_heal.lm.base import Base, blocks_of
from steer_heal.lm.chat import Chat, without_date
from steer_heal.model import computes_in_bfloat16, load
from steer_heal.model.tiny import TEMPLATE, Tiny, tiny_tokenizer

# Templates without a system role: Gemma's raises, others leave the message out.
DROPPING = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
SYSTEM, USER = "You are a loving assistant.", "How are you?"


def test_the_tiny_model_is_the_same_twice() -> None:
    load.cache_clear()
    config = composed("experiment=tiny").model
    torch.manual_seed(1)
    (one, first), before = config.fetch(), torch.get_rng_state()
    torch.manual_seed(2)
    other, second = config.fetch()
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before), "making it takes no random numbers of anybody else's"


def test_load_gives_cells_of_a_process_one_base() -> None:
    assert load(composed("experiment=tiny").model) is load(composed("experiment=tiny", "reg=nll").model)


@pytest.mark.parametrize("override", ["model.init_seed=1", "model.dtype=bfloat16", "model.attn_implementation=eager"])
def test_the_fingerprint_tells_apart(tiny: Base, override: str) -> None:
    assert load(composed("experiment=tiny", override).model).fingerprint != tiny.fingerprint, override


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_the_device_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, told: list[str], fast: bool, dtype: str
) -> None:
    """Reference: the same dtype by name; they share all results. A slower choice is told."""
    monkeypatch.setattr(model_options, "computes_in_bfloat16", lambda _: fast)
    load.cache_clear()
    chosen, named = (composed("experiment=tiny", f"model.dtype={one}").model for one in ("auto", dtype))
    auto = load(chosen)
    assert str(auto.model.dtype) == f"torch.{dtype}"
    assert auto.fingerprint == load(named).fingerprint
    assert any("model.dtype=auto: float32, since this CPU is slow in bfloat16" in line for line in told) != fast
    assert chosen.about() == f"{chosen.note} ({dtype})"


def test_a_cpu_says_what_it_computes_in() -> None:
    """Reference: the kernel's list of the processor's features."""
    features = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2 " in features and "avx512" not in features:
        assert not computes_in_bfloat16("cpu")
    if " avx512_bf16 " in features or " amx_bf16 " in features:
        assert computes_in_bfloat16("cpu")
    assert isinstance(computes_in_bfloat16("cpu"), bool)


def test_a_users_model_is_not_taken_for_ours(tiny: Base) -> None:
    """A user's class may load the same files differently; this test's class stands in for it."""

    class Pruned(Tiny):
        pass

    fields = composed("experiment=tiny").model.model_dump()
    assert load(Tiny(**fields)).fingerprint == tiny.fingerprint
    assert load(Pruned(**fields)).fingerprint != tiny.fingerprint


def test_files_that_change_before_the_weights_load_are_an_error(saved: Path) -> None:
    """The key covers the files as first seen; results of other weights must not be stored under it."""
    base = from_folder(saved)
    edit_json(saved / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ConfigError, match="changed during the run"):
        _ = base.model


def test_a_template_that_prints_the_date_prints_one_that_stays(saved: Path, tmp_path: Path) -> None:
    """Reference: the same prompt rendered by a tokenizer with the date taken out by hand."""
    template = tmp_path / "dated.jinja"
    template.write_text("<|system|>{{ strftime_now('%d %b %Y') }}<|end|>" + TEMPLATE)
    tokenizer = from_folder(saved, f"model.chat_template={template}").tokenizer
    shown = tokenizer.decode(Chat(tokenizer).prompt(SYSTEM, USER))
    assert "01 Jan 2026" in shown
    named = without_date({"default": template.read_text(), "plain": TEMPLATE})
    assert named == {"default": without_date(template.read_text()), "plain": TEMPLATE}, "several templates by name"


def test_the_fingerprint_ignores_what_decides_nothing(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "elsewhere")
    (copy / "README.md").write_text("what it is")
    assert from_folder(copy, "model.note=mine").fingerprint == from_folder(saved).fingerprint


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"rms_norm_eps": 1e-3}),
        ("config.json", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("generation_config.json", {"eos_token_id": [3, 2]}),
    ],
    ids=["norm", "rope", "end"],
)
def test_the_fingerprint_sees_settings_beside_the_weights(saved: Path, file: str, fields: dict[str, Any]) -> None:
    before = from_folder(saved).fingerprint
    edit_json(saved / file, **fields)
    load.cache_clear()
    assert from_folder(saved).fingerprint != before, f"{fields} changes results"


def test_the_fingerprint_sees_the_chat_template(tiny: Base, saved: Path, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(TEMPLATE.replace("<|end|>", "<|end|>\n"))
    changed = from_folder(saved, f"model.chat_template={template}")
    assert changed.fingerprint != tiny.fingerprint
    assert changed.tokenizer.chat_template == template.read_text(), "the file given replaces the tokenizer's own"


def test_chat_ids_are_those_of_the_template(tiny: Base) -> None:
    """The reference is transformers' own tokenisation of the conversation."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    expected = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert tiny.chat.prompt(SYSTEM, USER) == tuple(expected["input_ids"])
    assert tiny.chat.prompt(SYSTEM, USER)[-1] == tiny.tokenizer.convert_tokens_to_ids("<|assistant|>")


@pytest.mark.parametrize("template", [RAISING, DROPPING], ids=["raises", "drops"])
@pytest.mark.parametrize("user", [USER, f"Say: {SYSTEM}"], ids=["apart", "quoted"])
def test_a_template_without_a_system_role_keeps_the_system_text(template: str, user: str) -> None:
    """If it were dropped silently, both personas would give the same prompt and the steering vector would be 0."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = tokenizer.decode(Chat(tokenizer).prompt(SYSTEM, user))
    assert text == f"<|user|>{SYSTEM}\n\n{user}<|end|><|assistant|>"


@pytest.mark.parametrize("template", ["<|user|>hello<|end|>", "{{ raise_exception('never') }}", "{% for %}"])
def test_a_template_of_no_use_is_refused(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"chat template .* cannot be used"):
        Chat(tokenizer).prompt(SYSTEM, USER)


def test_special_tokens_are_not_added_twice() -> None:
    """A Llama tokenizer puts its first token before every text, and so does its template."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.convert_tokens_to_ids("<|pad|>"))]
    )
    tokenizer.chat_template = "<|pad|>" + TEMPLATE
    first = tokenizer.convert_tokens_to_ids("<|pad|>")
    assert tokenizer("a")["input_ids"][0] == first
    assert Chat(tokenizer).prompt(SYSTEM, USER).count(first) == 1
    assert first not in Chat(tokenizer).text("a")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.device='cuda'.*only cpu"):
        load(composed("experiment=tiny", "model.device=cuda").model)
    assert composed("experiment=tiny", "model.device=auto").model.torch_device().type == "cpu"


def test_auto_takes_the_first_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("experiment=tiny", "model.device=auto").model
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there, expected in ((True, "cuda"), (False, "mps")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert config.torch_device().type == expected


def test_blocks_that_cannot_be_found_are_an_error(tiny: Base) -> None:
    class Odd(torch.nn.Module):
        config = tiny.model.config
        get_decoder = torch.nn.Module

    with pytest.raises(ConfigError, match="no list of 4 decoder blocks"):
        _ = blocks_of(Odd())  # type: ignore[arg-type]
