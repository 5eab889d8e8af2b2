"""Models, tokenizers and templates that are odd in one way: right results, or one line before anything starts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.compose import composed
from helpers.folders import edit_json, from_folder
from helpers.toys import greedy, lora, own_loss, preset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from steer_heal.config import ConfigError
from steer_heal.eval import EvalInput, evaluate
from steer_heal.experiment import Experiment
from steer_heal.generate import generate
from steer_heal.lm.base import Base
from steer_heal.lm.chat import Chat
from steer_heal.lm.student import Student, Subject
from steer_heal.lora import live_adapter
from steer_heal.model.tiny import CORPUS, TEMPLATE, tiny_tokenizer

SYSTEM, USER = "You are a loving assistant.", "How are you?"
FEW = ("generate.max_new_tokens=6",)


def cell(folder: Path, *overrides: str) -> Experiment:
    """An experiment with the model in a folder, as a user of `experiment=tiny model=hub` has it."""
    given = (f"model.id={folder}", "model.dtype=float32", "model.device=cpu")
    return composed("experiment=tiny", "model=hub", *given, *FEW, *overrides)


def refused(folder: Path, *overrides: str) -> str:
    """The line with which a cell is refused before it starts; no weights are loaded for it."""
    with pytest.raises(ConfigError) as error:
        cell(folder, *overrides).prepare()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 480, "a line that a person reads"
    return str(error.value)


def retokenized(folder: Path, change: Callable[[PreTrainedTokenizerFast], object]) -> Path:
    """The folder, with its tokenizer changed."""
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def templated(folder: Path, template: Any) -> Path:
    """The folder, with another chat template."""
    (folder / "chat_template.jinja").unlink()
    return retokenized(folder, lambda tokenizer: setattr(tokenizer, "chat_template", template))


def figure(exp: Experiment, base: Base, evaluation: str, name: str) -> float:
    """A figure of base."""
    subject, option = Subject(Student(base)), exp.eval[evaluation]
    given = EvalInput("base", exp.trait, subject, None, None, None)  # type: ignore[arg-type]
    return evaluate(option, subject, option.material(given), runtime=exp.runtime).values[name]


# Weights and files


def wrapped(base: Base) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(from_copy(base), config)  # type: ignore[return-value]


def from_copy(base: Base) -> Any:
    return copy.deepcopy(base.model)


def test_an_adapter_beside_the_weights_is_refused(tiny: Base, saved: Path) -> None:
    """transformers would put it on top of the weights without a word."""
    wrapped(tiny).save_pretrained(saved)
    assert "an adapter lies beside the weights" in refused(saved)


def test_an_adapter_alone_says_what_it_is(tiny: Base, tmp_path: Path) -> None:
    wrapped(tiny).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer.save_pretrained(tmp_path / "adapter")
    assert "is an adapter" in (line := refused(tmp_path / "adapter"))
    assert "merge_and_unload" in line


def test_weights_without_a_place_are_told_and_no_reason_to_refuse(saved: Path, warnings: list[str]) -> None:
    """The tiny model has four blocks; towers and further heads of others are legitimate."""
    edit_json(saved / "config.json", num_hidden_layers=3)
    cell(saved).prepare()
    (line,) = (line for line in warnings if "no place" in line)
    assert "9 of its weights have no place in the model of its config.json, such as model.layers.3." in line


def test_biases_that_the_configuration_has_no_place_for(saved: Path, warnings: list[str]) -> None:
    held = load_file(saved / "model.safetensors")
    held |= {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(4)}
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    cell(saved).prepare()
    assert any("4 of its weights have no place" in line for line in warnings)


def test_a_lacking_weight_is_found_before_the_start(saved: Path) -> None:
    held = load_file(saved / "model.safetensors")
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights, such as model.layers.1.mlp.up_proj.weight" in refused(saved)


def test_a_lacking_shard_is_found_before_the_start(tiny: Base, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    tiny.model.save_pretrained(saved, max_shard_size="30KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 2
    cell(saved).prepare()
    shards[1].unlink()
    line = refused(saved)
    assert str(saved) in line
    assert shards[1].name in line or "lacks" in line


def test_a_weight_that_is_no_number_is_named(saved: Path) -> None:
    held = load_file(saved / "model.safetensors")
    held["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"not finite: model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        _ = from_folder(saved).model


# Ids and lengths


def test_a_pad_id_exists(saved: Path) -> None:
    """A pad token that was added for padding has no row among the model's embeddings."""
    folder = retokenized(saved, lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))
    cell(folder).prepare()
    beyond = from_folder(folder)
    assert beyond.tokenizer.pad_token_id == 400, "this test needs a pad token beyond the vocabulary"
    assert 0 <= beyond.pad_id < 400


def test_without_eos_the_template_says_where_a_turn_ends(saved: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(saved / name, eos_token_id=None, pad_token_id=None)

    def forget(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.eos_token = tokenizer.pad_token = None

    retokenized(saved, forget)
    cell(saved).prepare()
    base = from_folder(saved)
    assert base.end_ids == {base.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert 0 <= base.pad_id < 400


@pytest.mark.parametrize("id", [-1, 400])
def test_an_eos_that_the_model_cannot_say_is_refused(saved: Path, id: int) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(saved / name, eos_token_id=id)
    assert f"eos_token_id={id} of its config.json" in refused(saved)


def test_a_token_of_the_template_beyond_the_vocabulary_is_refused(saved: Path) -> None:
    def tagged(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|im_start|>assistant")

    line = refused(retokenized(saved, tagged))
    assert "holds token 400 (<|im_start|>)" in line
    assert "among the model's 400" in line


def gpt2(folder: Path, positions: int) -> Path:
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=4, n_head=4, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_longer_than_learned_positions_are_refused(tmp_path: Path) -> None:
    line = refused(gpt2(tmp_path / "short", 96))
    assert "tokens, and the model has positions for 96; shorten it" in line
    cell(gpt2(tmp_path / "long", 1024)).prepare()


def test_room_for_answers_counts(tmp_path: Path) -> None:
    """Prompts alone fit; with the answers they do not."""
    folder = gpt2(tmp_path / "gpt2", 420)
    cell(folder).prepare()
    assert "or lower generate.max_new_tokens" in refused(folder, "generate.max_new_tokens=400")


def test_texts_longer_than_rotary_positions_are_told(saved: Path, warnings: list[str]) -> None:
    edit_json(saved / "config.json", max_position_embeddings=97)
    cell(saved).prepare()
    assert any("has positions for 97" in line for line in warnings)


# Templates


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


# Answers and texts as ids


def sentencepiece(folder: Path, base: Base) -> Path:
    """The tiny model with a tokenizer that puts a space before every text, but not within a conversation."""
    first = Tokenizer(models.BPE(unk_token="<unk>"))
    first.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>"]
    first.train_from_iterator(
        CORPUS.splitlines() * 3, trainers.BpeTrainer(vocab_size=140, special_tokens=specials, show_progress=False)
    )
    learned = json.loads(first.to_str())["model"]
    for byte in range(256):
        learned["vocab"].setdefault(f"<0x{byte:02X}>", len(learned["vocab"]))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    piece = Tokenizer(models.BPE(vocab=learned["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>"))
    piece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    piece.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=piece, **named)
    tokenizer.chat_template = TEMPLATE.replace("|>{{ m['content'] }}<|end|>", "|>\n{{ m['content'] }}</s>\n").replace(
        "<|assistant|>{% endif", "<|assistant|>\n{% endif"
    )
    assert len(tokenizer) <= 400, "more tokens than the tiny model has"
    base.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, eos_token_id=2, pad_token_id=2)
    return folder


def test_answers_have_the_ids_of_the_conversation(tiny: Base, tmp_path: Path) -> None:
    """Reference: transformers' loss of the whole conversation's ids, with the prompt's masked."""
    exp = cell(sentencepiece(tmp_path, tiny))
    exp.prepare()
    base, probes = from_folder(tmp_path), exp.trait.probes[:6]
    alone = base.chat.text("I am here.")
    towards = against = 0.0
    for probe in probes:
        messages = [{"role": "system", "content": exp.trait.neutral}, {"role": "user", "content": probe.prompt}]
        text = str(base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        prompt = tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])
        for answer, sign in ((probe.trait, 1), (probe.counter, -1)):
            whole = tuple(base.tokenizer(text + answer, add_special_tokens=False)["input_ids"])
            assert base.chat.pair(exp.trait.neutral, probe.prompt, answer) == (prompt, whole[len(prompt) :])
            loss = own_loss(base.model, prompt, whole[len(prompt) :])
            towards, against = (towards - loss, against) if sign > 0 else (towards, against - loss)
    assert alone[0] != base.chat.pair(SYSTEM, USER, "I am here.")[1][0], "this test needs a tokenizer that tells apart"
    few = exp.model_copy(update={"trait": exp.trait.model_copy(update={"probes": probes})})
    assert figure(few, base, "trait", "trait") == pytest.approx((towards - against) / len(probes), abs=1e-5)


def test_white_space_that_the_template_puts_before_an_answer_belongs_to_it() -> None:
    """Reference: the ids of the rendered conversation. Llama 2's and Mistral's templates are so."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ ' ' ~ m['content'] }}")
    chat = Chat(tokenizer)
    messages = [
        {"role": "system", "content": SYSTEM}, {"role": "user", "content": USER},
        {"role": "assistant", "content": "I am here."},
    ]  # fmt: skip
    whole = tuple(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    prompt, answer = chat.pair(SYSTEM, USER, "I am here.")
    assert prompt + answer == whole[:-1], "all but the end of the turn"


@pytest.mark.parametrize(
    ("single", "first"),
    [
        pytest.param("$A <|end|>", None, id="appends eos"),
        pytest.param("<|pad|> $A", "<|pad|>", id="begins with BOS"),
        pytest.param("<|pad|> $A <|end|>", "<|pad|>", id="both"),
        pytest.param("<|user|> $A", None, id="begins with another token"),
    ],
)
def test_a_text_alone_has_at_most_a_bos(tiny: Base, saved: Path, single: str, first: str | None) -> None:
    """Reference: transformers' loss of the text's own ids behind the BOS, or behind its first token."""
    plain = tiny_tokenizer()
    added = [(token, plain.convert_tokens_to_ids(token)) for token in ("<|end|>", "<|pad|>", "<|user|>")]

    def processed(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.bos_token = "<|pad|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=added)

    base, exp = from_folder(retokenized(saved, processed)), preset()
    head = () if first is None else (plain.convert_tokens_to_ids(first),)
    losses = []
    for item in exp.eval["damage"].texts:  # type: ignore[attr-defined]
        ids = head + tuple(plain(item.text)["input_ids"])
        losses.append(own_loss(tiny.model, ids[:1], ids[1:]))
    assert figure(exp, base, "damage", "text_nll_raw") == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_a_text_that_leaves_no_token_to_score_is_refused(saved: Path) -> None:
    exp = cell(saved)
    damage = exp.eval["damage"]
    short = damage.texts[0].model_copy(update={"text": "an"})  # type: ignore[attr-defined]
    given = exp.eval | {"damage": damage.model_copy(update={"texts": (short,)})}
    assert len(tiny_tokenizer()("an")["input_ids"]) == 1, "this test needs a text of one token"
    with pytest.raises(ConfigError, match=r"eval\.damage\.texts\[0\]\.text: too short"):
        exp.model_copy(update={"eval": given}).prepare()


def test_a_probe_that_leaves_no_token_to_score_is_refused(saved: Path) -> None:
    exp = cell(saved)
    retokenized(saved, lambda t: setattr(t.backend_tokenizer, "normalizer", stripping()))
    probe = exp.trait.probes[0].model_copy(update={"counter": " "})
    given = exp.trait.model_copy(update={"probes": (probe,)})
    with pytest.raises(ConfigError, match=r"trait\.probes\[0\]\.counter: too short"):
        exp.model_copy(update={"trait": given}).prepare()


def stripping() -> Any:
    from tokenizers import normalizers

    return normalizers.Strip()


def test_what_is_checked_before_the_start_is_what_is_done(saved: Path) -> None:
    """The skeleton on which an adapter is tried has the layers that the heal adapts."""
    config = composed("model=hub", f"model.id={saved}", "model.dtype=float32").model
    size, skeleton = lora(first=0.5), config.skeleton()
    size.check_fits(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters()), "weights were loaded"
    with live_adapter(size, from_folder(saved).model, 0) as live:
        adapted = sorted(live.peft_config["default"].target_modules)  # type: ignore[arg-type]
    assert adapted == sorted(size.peft_config(skeleton).target_modules)  # type: ignore[arg-type]
