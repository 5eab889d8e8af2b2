"""Encode conversations, answers and plain text as token ids, by a tokenizer and its chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from steer_heal.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Variable = bool | int | float | str | None
SYSTEM, USER, ANSWER = "a persona", "a question", "Yes."  # of the conversation with which a template is tried
# a tag that opens or closes reasoning: <think>, </think>, [THINK], <|START_THINKING|>
THOUGHT = re.compile(r"[<\[◁][^<>\[\]◁▷\s]{0,20}?(?:think|thought|reason|reflect)[^<>\[\]◁▷\s]{0,20}[>\]▷]", re.I)
CLOSING = re.compile(r"/|end", re.I)


def without_date(template: Any) -> Any:
    """Make a chat template that prints today's date print a fixed one, so that a prompt's ids do not change by the day.

    A dict of named templates has each of them changed. A byte order mark at the head, which would become tokens, goes.
    """
    if isinstance(template, dict):
        return {name: without_date(one) for name, one in template.items()}
    template = template.removeprefix("\ufeff")
    if "strftime_now" not in template:
        return template
    return "{%- macro strftime_now(form) %}01 Jan 2026{% endmacro -%}" + template


class _Form(NamedTuple):
    """A way to hand messages to a template."""

    folded: bool  # the system message opens the user's turn, for a template without a system role
    parts: bool  # contents are lists of parts, as multimodal templates want them
    extras: Mapping[str, Any]  # variables that some templates loop over unasked

    def messages(self, system: str, user: str, *later: tuple[str, str]) -> list[dict[str, Any]]:
        turns = [("user", f"{system}\n\n{user}")] if self.folded else [("system", system), ("user", user)]
        content = (lambda text: [{"type": "text", "text": text}]) if self.parts else (lambda text: text)
        return [{"role": role, "content": content(text)} for role, text in (*turns, *later)]


EXTRAS: tuple[dict[str, Any], ...] = ({}, {"tools": [], "documents": []})
FORMS = tuple(_Form(*choice) for choice in product((False, True), (False, True), EXTRAS))


class Chat:
    """A tokenizer and its chat template. Raises ConfigError when it is made of a template that cannot be used."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Variable] | None = None) -> None:
        """Take the template's variables besides; those that are None are left to the template."""
        self.tokenizer = tokenizer
        self.variables = {name: value for name, value in (variables or {}).items() if value is not None}
        template = tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            raise _unusable(f"there are several, {', '.join(sorted(template))}, and none is named default")
        source = template["default"] if isinstance(template, dict) else template or ""
        for name in self.variables:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ConfigError(f"model.template.{name}: the chat template of the tokenizer has no such variable")
        self._form, refusals = None, list[str]()
        for form in FORMS:
            try:
                self._form = form
                text = self._rendered(SYSTEM, USER)
                break
            except ConfigError as error:
                refusals.append(str(error))
        else:
            raise ConfigError(refusals[0])
        if USER not in text:
            raise _unusable("it drops the user's message")
        tags = list(THOUGHT.finditer(text, text.rindex(USER) + len(USER)))
        self.thinks = sorted({name for name in re.findall(r"\b\w*thinking\b", source) if name.islower()})
        if tags and not CLOSING.search(tags[-1].group()):
            switches = " or ".join(f"model.template.{name}=false" for name in self.thinks if name not in self.variables)
            none = "no variable such as model.template.enable_thinking=false closes it"
            advice = f"try {switches}" if switches else none
            raise ConfigError(
                f"the chat template of the tokenizer opens a thought, {tags[-1].group()}, in which everything would be "
                f"said and measured: {advice}, or give another template "
                "with model.chat_template=FILE.jinja"
            )

    def prompt(self, system: str, user: str) -> tuple[int, ...]:
        """Return the ids of a conversation up to and including the assistant tag.

        The system message is always explicit: if the template has no system role (it raises, or omits the message), the
        user's turn opens with it. Raises ConfigError for texts that the template does not render.
        """
        return self.text(self._rendered(system, user))

    def pair(self, system: str, user: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of a conversation's prompt, and those of a given answer as they are in that conversation.

        Alone an answer may have other ids: some tokenizers put a space before every text. Where the prompt's ids would
        change with an answer behind them, the answer's are those that it has alone.
        """
        shown = self._rendered(system, user)
        prompt, whole = self.text(shown), self.text(f"{shown}{self._gap}{answer}")
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self.text(f"{self._gap}{answer}")

    def text(self, text: str) -> tuple[int, ...]:
        """Return the ids of plain text, without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def document(self, text: str) -> tuple[int, ...]:
        """Return the ids of text that stands alone, behind a BOS if the tokenizer puts one there, and nothing else."""
        plain, whole = self.text(text), tuple(self.tokenizer(text)["input_ids"])
        first = self.tokenizer.bos_token_id
        adds = first is not None and whole[:1] == (first,) and whole[1 : 1 + len(plain)] == plain
        return (first, *plain) if adds else plain

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Special tokens with which the template ends an assistant's turn, whatever the tokenizer calls its eos."""
        known = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        found = set()
        for later in ((("assistant", ANSWER),), (("assistant", ANSWER), ("user", USER))):
            try:
                whole = self._render(SYSTEM, USER, *later)
            except ConfigError:  # the template takes no such conversation
                continue
            start = whole.find(ANSWER, whole.find(USER) + len(USER))
            after = self.text(whole[start + len(ANSWER) :].lstrip()) if start >= 0 else ()
            found |= {i for i in after[:1] if i in known}
        return frozenset(found)

    @functools.cached_property
    def _gap(self) -> str:
        """The white space that the template puts between the assistant tag and an answer."""
        try:
            whole = self._render(SYSTEM, USER, ("assistant", ANSWER))
        except ConfigError:
            return ""
        shown = self._rendered(SYSTEM, USER)
        gap, found, _ = whole.removeprefix(shown).partition(ANSWER)
        return gap if whole.startswith(shown) and found and not gap.strip() else ""

    def _rendered(self, system: str, user: str) -> str:
        text = self._render(system, user, tagged=True)
        if text.count(system.strip()) <= user.count(system.strip()):
            raise _unusable("it drops the system message")
        return text

    def _render(self, system: str, user: str, *later: tuple[str, str], tagged: bool = False) -> str:
        from jinja2 import TemplateError

        assert self._form is not None
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    self._form.messages(system, user, *later), tokenize=False, add_generation_prompt=tagged,
                    **(dict(self._form.extras) | self.variables),
                )
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # somebody else's template
            raise _unusable(" ".join(str(error).split())) from error


def _unusable(reason: str) -> ConfigError:
    advice = "give another with model.chat_template=FILE.jinja"
    return ConfigError(f"the chat template of the tokenizer cannot be used: {reason:.200}; {advice}")
