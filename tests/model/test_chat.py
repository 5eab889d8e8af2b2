"""Templates and tokenizers that are odd in one way: the ids of the conversation, or one line before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.folders import from_folder
from helpers.odd_models import SYSTEM, USER, cell, refused, templated
from helpers.toys import greedy, preset
from transformers import PhiConfig, PhiForCausalLM

from steer_heal.config import ConfigError
from steer_heal.generate import generate
from steer_heal.lm.base import Base
from steer_heal.lm.chat import Chat
from steer_heal.lm.student import Student
from steer_heal.model.tiny import TEMPLATE, tiny_tokenizer


def test_named_templates_without_a_default_are_refused(saved: Path) -> None:
    line = refused(templated(saved, {"tool_use": TEMPLATE, "rag": TEMPLATE}))
    assert "there are several, rag, tool_use, and none is named default" in line
    assert "model.chat_template=FILE" in line


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% for tool in tools %}{{ tool }}{% endfor %}" + TEMPLATE, id="loops over tools"),
        pytest.param("{% for one in documents %}{{ one }}{% endfor %}" + TEMPLATE, id="loops over documents"),
        pytest.param("\ufeff" + TEMPLATE, id="byte order mark"),
        pytest.param(
            TEMPLATE.replace("{{ m['content'] }}", "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"),
            id="content in parts",
        ),
        pytest.param(
            TEMPLATE.replace(
                "{{ m['content'] }}", "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c.text }}{% endif %}"
                "{% endfor %}",
            ),
            id="text parts among others",
        ),
    ],
)  # fmt: skip
def test_templates_that_want_more_than_messages(tiny: Base, saved: Path, template: str) -> None:
    """Reference: the plain template's ids."""
    cell(templated(saved, template)).prepare()
    assert from_folder(saved).chat.prompt(SYSTEM, USER) == tiny.chat.prompt(SYSTEM, USER)


THINKS = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
MAY = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think></think>\n{% endif %}"
SWITCHED = TEMPLATE.replace("<|assistant|>{% endif %}", f"<|assistant|>{MAY}{{% endif %}}")


def test_a_prompt_that_ends_in_a_thought_is_refused(saved: Path) -> None:
    """Everything would be said and scored inside the thought."""
    line = refused(templated(saved, THINKS))
    assert "opens a thought, <think>" in line
    assert "no variable such as model.template.enable_thinking=false closes it" in line


@pytest.mark.parametrize("tag", ["<thinking>", "[THINK]", "<|START_THINKING|>", "<seed:think>", "◁think▷"])
def test_thoughts_by_other_names(tag: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS.replace("<think>", tag)
    with pytest.raises(ConfigError, match="opens a thought"):
        Chat(tokenizer)


@pytest.mark.parametrize("shut", ["<think></think>", "<think>\n\n</think>\n\n", "<|START_THINKING|><|END_THINKING|>"])
def test_a_thought_that_is_closed_is_fine(shut: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS.replace("<think>", shut)
    assert Chat(tokenizer).prompt("Never think: <think>", USER), "a tag that a user writes opens nothing"


def test_a_template_variable_closes_the_thought(saved: Path) -> None:
    """Reference: transformers' own rendering with the variable."""
    folder = templated(saved, SWITCHED)
    assert "try model.template.enable_thinking=false" in refused(folder)
    given = "model.template.enable_thinking=false"
    cell(folder, given).prepare()
    base = from_folder(folder, given)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    expected = base.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, enable_thinking=False
    )
    assert base.chat.prompt(SYSTEM, USER) == tuple(expected["input_ids"])


def test_a_variable_is_part_of_the_models_identity(saved: Path) -> None:
    folder = templated(saved, TEMPLATE + "{% if enable_thinking %}{% endif %}")
    plain, off = from_folder(folder), from_folder(folder, "model.template.enable_thinking=false")
    assert plain.fingerprint != off.fingerprint
    assert cell(folder).fingerprint != cell(folder, "model.template.enable_thinking=false").fingerprint


def test_a_variable_that_the_template_lacks_is_refused(saved: Path) -> None:
    assert "model.template.enable_thinking: the chat template of the tokenizer has no such variable" in refused(
        saved, "model.template.enable_thinking=false"
    )


# Ends of turns


def talkative(folder: Path) -> Path:
    """A model that often says <|end|>, with which its template ends a turn, and whose eos is another token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PhiForCausalLM(config)
    model.lm_head.bias.data.zero_()
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("<|end|>")] = 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_turn_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    """Reference: transformers' greedy answers with both tokens as ends."""
    base = from_folder(talkative(tmp_path))
    end, eos = (base.tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>"))
    assert base.end_ids == {end, eos}
    exp = preset("generate.max_new_tokens=12")
    found = generate(exp.generate, Student(base), SYSTEM, [USER, "What?"], None, [0.0], 0, runtime=exp.runtime)
    assert all(end not in row.ids[:-1] for row in found.rows), "an answer runs past its end"
    assert any(row.ended for row in found.rows)
    prompt = base.chat.prompt(SYSTEM, USER)
    assert greedy(base.model, prompt, 8, [end, eos])[-1] == end


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        pytest.param(TEMPLATE, {"<|end|>"}, id="eos"),
        pytest.param(TEMPLATE.replace("<|end|>", "\n<|pad|>\n"), {"<|pad|>"}, id="behind a line's end"),
        pytest.param(TEMPLATE.replace("<|end|>", ""), {"<|user|>"}, id="the next turn"),
        pytest.param("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", set(), id="none"),
    ],
)  # fmt: skip
def test_ends_that_templates_have(template: str, ends: set[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert {tokenizer.convert_ids_to_tokens(i) for i in Chat(tokenizer).end_ids} == ends


TAGLESS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def test_a_template_that_always_leaves_out_the_assistant_tag_gets_it(tiny: Base) -> None:
    """Reference: the plain template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TAGLESS
    assert Chat(tokenizer).prompt(SYSTEM, USER) == tiny.chat.prompt(SYSTEM, USER)
    assert Chat(tokenizer).pair(SYSTEM, USER, "Yes") == tiny.chat.pair(SYSTEM, USER, "Yes")


def test_the_last_turns_end_goes_before_that_of_earlier_ones() -> None:
    """gpt-oss ends a message with one token and an answer with another; stopping at both would cut answers short."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if loop.last %}<|pad|>{% else %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert Chat(tokenizer).end_ids == {tokenizer.convert_tokens_to_ids("<|pad|>")}


def test_what_a_template_writes_before_answers_is_told(warnings: list[str]) -> None:
    """Qwen 3 writes an empty thought; without a switch for it, answers are scored where conversations have none."""
    tokenizer = tiny_tokenizer()
    thought = "{% if m['role'] == 'assistant' and enable_thinking is not defined %}<think></think>{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", thought + "{{ m['content'] }}")
    Chat(tokenizer)
    (line,) = warnings
    assert "'<think></think>' between the assistant tag and an answer" in line
    assert "try model.template.enable_thinking=false" in line


@pytest.mark.parametrize("form", ["m['content'] | tojson", "m['content'] | e", "m['content'] | replace(' ', '  ')"])
def test_templates_that_escape_are_used(form: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("m['content']", form)
    assert Chat(tokenizer).prompt('You say "so" & so.', USER)


@pytest.mark.parametrize(("code", "kind"), [("{{ 1/0 }}", "ZeroDivisionError"), ("{{ [1][5].x }}", ""), ("", "empty")])
def test_a_template_that_fails_is_one_line(saved: Path, code: str, kind: str) -> None:
    (saved / "chat_template.jinja").write_text(code)
    line = refused(saved, f"model.chat_template={saved}/chat_template.jinja")
    assert "chat template of the tokenizer cannot be used" in line
    assert kind in line


def test_a_word_in_a_template_is_no_variable() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS.replace("<think>", "<thinking>")
    with pytest.raises(ConfigError, match="no variable such as"):
        Chat(tokenizer)
    with pytest.raises(ConfigError, match=r"model\.template\.thinking: the chat template .* has no such variable"):
        Chat(tokenizer, {"thinking": False})


def test_personas_of_the_same_tokens_are_refused(saved: Path) -> None:
    """The steering vector would be 0."""
    exp = cell(templated(saved, TEMPLATE.replace("m['content']", "m['content'] | trim")))
    alike = exp.trait.model_copy(update={"negative": f"{exp.trait.positive} "})
    with pytest.raises(ConfigError, match=r"trait\.positive and trait\.negative: the tokenizer makes the same tokens"):
        exp.model_copy(update={"trait": alike}).prepare()


def test_a_template_that_cuts_messages_is_refused(saved: Path) -> None:
    """With content in parts it would write the list out, message and all."""
    assert "it drops the system message" in refused(
        templated(saved, TEMPLATE.replace("m['content']", "m['content'][:5]"))
    )
