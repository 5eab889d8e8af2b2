"""Answers and texts as ids: as they are in a conversation, or alone behind a BOS at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.folders import edit_json, from_folder
from helpers.odd_models import SYSTEM, USER, cell, retokenized
from helpers.toys import own_loss, preset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from steer_heal.config import ConfigError
from steer_heal.eval import EvalInput, evaluate
from steer_heal.experiment import Experiment
from steer_heal.lm.base import Base
from steer_heal.lm.chat import Chat
from steer_heal.lm.student import Student, Subject
from steer_heal.model.tiny import CORPUS, TEMPLATE, tiny_tokenizer


def figure(exp: Experiment, base: Base, evaluation: str, name: str) -> float:
    """A figure of base."""
    subject, option = Subject(Student(base)), exp.eval[evaluation]
    given = EvalInput("base", exp.trait, subject, *[None] * 4)  # type: ignore[arg-type]
    return evaluate(option, subject, option.material(given), runtime=exp.runtime).values[name]


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


MOVING = (  # Mistral's: the system message stands in the last user turn, if that ends the conversation
    "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}{% if m['role'] == 'user' %}<|user|>"
    "{% if loop.last %}{{ system }} {% endif %}{{ m['content'] }}<|assistant|>"
    "{% else %}{{ ' ' ~ m['content'] }}<|end|>{% endif %}{% endfor %}"
)


def test_the_gap_is_found_where_an_answer_changes_the_head_of_a_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MOVING
    chat = Chat(tokenizer)
    prompt, answer = chat.pair(SYSTEM, USER, "I am here.")
    assert tokenizer.decode(prompt).endswith(f"{SYSTEM} {USER}<|assistant|>")
    assert answer == chat.text(" I am here.")


def test_a_prompt_whose_last_ids_change_with_an_answer_is_split_before_them() -> None:
    """Reference: the ids of the whole conversation. This one's prompt ends in a space."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|>: {% endif")
    prompt, answer = Chat(tokenizer).pair(SYSTEM, USER, "I am here.")
    whole = f"<|system|>{SYSTEM}<|end|><|user|>{USER}<|end|><|assistant|>: I am here."
    assert prompt + answer == tuple(tokenizer(whole)["input_ids"])
    assert tokenizer.decode(answer) in ("I am here.", " I am here.")
