"""Encode conversations, answers and plain text as token ids, by a tokenizer and its chat template."""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from steer_heal.config import ConfigError
from steer_heal.system.terminal import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Variable = bool | int | float | str | None
SYSTEM, USER, ANSWER = "sysmark", "usermark", "answermark"  # of the conversation with which a template is tried
# a tag that opens or closes reasoning: <think>, </think>, [THINK], <|START_THINKING|>, <|channel|>analysis
THOUGHT = re.compile(
    r"[<\[◁][^<>\[\]◁▷\s]{0,20}?(?:think|thought|reason|reflect|scratchpad|analysis)[^<>\[\]◁▷\s]{0,20}[>\]▷]"
    r"|<\|channel\|>analysis",
    re.I,
)
CLOSING = re.compile(r"/|end|no_?think", re.I)
RENDERED = {  # what transformers gives every template
    "messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token", "pad_token", "unk_token",
}  # fmt: skip
DATED = "{%- macro strftime_now(form) %}01 Jan 2026{% endmacro -%}"


def without_date(template: Any) -> Any:
    """Make a chat template that prints today's date print a fixed one, so that a prompt's ids do not change by the day.

    A dict of named templates has each of them changed. A byte order mark at the head, which would become tokens, goes.
    """
    if isinstance(template, dict):
        return {name: without_date(one) for name, one in template.items()}
    template = template.removeprefix("\ufeff")
    if "strftime_now" not in template or template.startswith(DATED):
        return template
    return DATED + template


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
        if source.strip() == "":
            raise _unusable("it is empty")
        there = _variables(source)
        for name in self.variables:
            if name not in there:
                raise ConfigError(f"model.template.{name}: the chat template of the tokenizer has no such variable")
        self._tag = ""
        self.form, text = self._chosen()
        if USER not in text:
            raise _unusable("it drops the user's message")
        if text == self._render(SYSTEM, USER):  # it pays no heed to add_generation_prompt
            self._tag = self._before_answer.rstrip()
        switches = [name for name in sorted(there) if "think" in name and name not in self.variables]
        self._check_thought(text[text.rindex(USER) + len(USER) :], switches)

    def _chosen(self) -> tuple[_Form, str]:
        """Return the first form that the template renders, and what it makes of it. Raises ConfigError of the first."""
        refusals = []
        for form in FORMS:
            self.form = form
            try:
                return form, self._rendered(SYSTEM, USER)
            except ConfigError as error:
                refusals.append(error)
        raise refusals[0]

    def _check_thought(self, tail: str, switches: list[str]) -> None:
        """Raise ConfigError for a prompt that ends in an open thought; warn of what conversations have and it lacks."""
        tried = " or ".join(f"model.template.{name}=false" for name in switches)
        advice = f"try {tried}" if tried else "no variable such as model.template.enable_thinking=false closes it"
        tags = [tag.group() for tag in THOUGHT.finditer(tail)]
        if tags and not CLOSING.search(tags[-1]):
            raise ConfigError(
                f"the chat template of the tokenizer opens a thought, {tags[-1]}, in which everything would be said "
                f"and measured: {advice}, or give another template with model.chat_template=FILE.jinja"
            )
        if between := self._before_answer.removeprefix(self._tag).strip():
            hint = f"; {advice}" if switches else ""
            warn_once(
                f"the chat template writes {between!r:.80} between the assistant tag and an answer: answers are scored "
                f"without it{hint}"
            )

    def prompt(self, system: str, user: str) -> tuple[int, ...]:
        """Return the ids of a conversation up to and including the assistant tag.

        The system message is always explicit: if the template has no system role (it raises, or omits the message), the
        user's turn opens with it. Raises ConfigError for texts that the template does not render.
        """
        return self.text(self._rendered(system, user))

    def pair(self, system: str, user: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of a conversation's prompt, and those of a given answer as they are in that conversation.

        Alone an answer may have other ids: some tokenizers put a space before every text. Where the prompt's last ids
        change with an answer behind them, the changed ones count as the answer's.
        """
        shown = self._rendered(system, user)
        gap = "" if self._before_answer.removeprefix(self._tag).strip() else self._before_answer[len(self._tag) :]
        prompt, whole = self.text(shown), self.text(f"{shown}{gap}{answer}")
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
        )
        return whole[:same], whole[same:]

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
        # the last turn, or one in the middle: between turns some write another token than the model says at the end
        for later in ((("assistant", ANSWER),), (("assistant", ANSWER), ("user", USER))):
            try:
                whole = self._render(SYSTEM, USER, *later)
            except ConfigError:  # the template takes no such conversation
                continue
            start = whole.find(ANSWER, whole.find(USER) + len(USER))
            after = self.text(whole[start + len(ANSWER) :].lstrip()) if start >= 0 else ()
            if found := {i for i in after[:1] if i in known}:
                return frozenset(found)
        return frozenset()

    @functools.cached_property
    def _before_answer(self) -> str:
        """What the template writes between the prompt and an answer: white space, or more."""
        try:
            whole = self._render(SYSTEM, USER, ("assistant", ANSWER))
        except ConfigError:
            return ""
        shown = self._render(SYSTEM, USER, tagged=True)  # its head may differ: some move the system message
        tail, end = shown[shown.rindex(USER) + len(USER) :], whole.rfind(ANSWER)
        between = whole[whole.rfind(USER, 0, max(end, 0)) + len(USER) : end]
        return between.removeprefix(tail) if end >= 0 and USER in whole[:end] and between.startswith(tail) else ""

    def _rendered(self, system: str, user: str) -> str:
        text = self._render(system, user, tagged=True) + self._tag
        if self.form.parts and re.search(r"['\"]type['\"]: ?['\"]text", text):
            raise _unusable("it writes a list of content parts out as it is")
        if not any(_count(text, form) > _count(user, form) for form in _escapes(system)):
            raise _unusable("it drops the system message")
        return text

    def _render(self, system: str, user: str, *later: tuple[str, str], tagged: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    self.form.messages(system, user, *later), tokenize=False, add_generation_prompt=tagged,
                    **(dict(self.form.extras) | self.variables),
                )
            )  # fmt: skip
        except Exception as error:  # somebody else's code, which may raise anything
            reason = " ".join(str(error).split())
            raise _unusable(
                reason if isinstance(error, TemplateError) else f"{type(error).__name__}: {reason}"
            ) from error


def _unusable(reason: str) -> ConfigError:
    advice = "give another with model.chat_template=FILE.jinja"
    return ConfigError(f"the chat template of the tokenizer cannot be used: {reason:.200}; {advice}")


def _variables(source: str) -> set[str]:
    """Return the variables that a template takes besides messages; all of its words if it cannot be parsed."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateError:  # a tag of transformers' own, such as generation
        return set(re.findall(r"\b[a-z]\w*\b", source))
    return meta.find_undeclared_variables(parsed) - RENDERED


def _escapes(text: str) -> set[str]:
    """Return the forms that a template may write a text in: as it is, as JSON, or escaped for HTML."""
    return {
        text,
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    }


def _count(text: str, part: str) -> int:
    """Count occurrences, whatever became of the white space."""
    return "".join(text.split()).count("".join(part.split()))
