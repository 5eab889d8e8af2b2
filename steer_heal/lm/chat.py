"""Encode conversations and plain text as token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steer_heal.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dateless(template: Any) -> Any:
    """Make a chat template that prints today's date print a fixed one, so that a prompt's ids do not change by the day.

    A dict of named templates has each of them changed.
    """
    if isinstance(template, dict):
        return {name: dateless(one) for name, one in template.items()}
    if "strftime_now" not in template:
        return template
    return "{%- macro strftime_now(form) %}01 Jan 2026{% endmacro -%}" + template


def chat_ids(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> tuple[int, ...]:
    """Return the ids of a conversation up to and including the assistant tag.

    The system message is always explicit: if the template has no system role (it raises, or omits the message), the
    user's turn opens with it. Raises ConfigError for a template that renders neither form.
    """
    from jinja2 import TemplateError

    separate = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    folded = [{"role": "user", "content": f"{system}\n\n{user}"}]
    reason = "it drops the system message"
    for messages in (separate, folded):
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            reason = str(error)
        else:
            if text.count(system.strip()) > user.count(system.strip()):
                return text_ids(tokenizer, text)
    raise ConfigError(f"the chat template of the tokenizer cannot be used: {reason}")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the ids of plain text, without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
