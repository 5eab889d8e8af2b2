"""What a model has room for: the ids of its vocabulary, and its positions. Found without loading weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from steer_heal.config import ConfigError
from steer_heal.lm.base import text_part, vocabulary
from steer_heal.lm.chat import Chat
from steer_heal.system.terminal import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError from its checks."""

    vocabulary: int
    positions: int | None  # tokens of which the model knows the places; None: any number
    fixed: bool  # beyond them there is nothing, such as no row of a learned table; if not, quality suffers

    @classmethod
    def of(cls, model: PreTrainedModel) -> Limits:
        """Read the limits off a model's modules and configuration."""
        known = _tables(model)
        if known:
            return cls(vocabulary(model), min(known), True)
        config = model.config.get_text_config()
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
        return cls(vocabulary(model), getattr(config, "max_position_embeddings", None) if rotary else None, False)

    def check_ids(self, ids: Iterable[int], of: str, chat: Chat) -> None:
        """Raise ConfigError for an id that the model has no embedding for."""
        beyond = sorted({i for i in ids if not 0 <= i < self.vocabulary})
        if beyond:
            token = chat.tokenizer.convert_ids_to_tokens(beyond[0]) if beyond[0] >= 0 else None
            raise ConfigError(
                f"{of} holds token {beyond[0]}{f' ({token})' if token else ''}, which is not among the model's "
                f"{self.vocabulary}: its tokenizer and its weights do not belong together"
            )

    def check_ends(self, generation: Any, chat: Chat) -> None:
        """Raise ConfigError for an end of turn that the model cannot say."""
        given = getattr(generation, "eos_token_id", None)
        for id in given if isinstance(given, list) else [given]:
            if id is not None and not 0 <= id < self.vocabulary:
                raise ConfigError(
                    f"eos_token_id={id} of its config.json or generation_config.json is not among the model's "
                    f"{self.vocabulary} tokens; correct it, or take it out"
                )
        self.check_ids([i for i in (chat.tokenizer.eos_token_id,) if i is not None], "the tokenizer's eos_token", chat)

    def check_texts(self, texts: Sequence[tuple[str, tuple[int, ...], int]], chat: Chat) -> None:
        """Check texts, each with its place in the configuration, its ids, and the number of tokens that may follow it.

        Raises ConfigError, or warns where more than the model's positions only harm quality.
        """
        for place, ids, _ in texts:
            self.check_ids(ids, place, chat)
        place, ids, room = max(texts, key=lambda text: len(text[1]) + text[2])
        if self.positions is None or len(ids) + room <= self.positions:
            return
        line = f"{place} takes up to {len(ids) + room} tokens, and the model has positions for {self.positions}"
        if self.fixed:
            raise ConfigError(
                f"{line}; shorten it{', or lower generate.max_new_tokens' if room else ' (docs/extending.md)'}"
            )
        warn_once(f"{line}: what is said beyond them is not to be trusted")


def _tables(model: PreTrainedModel) -> list[int]:
    """Return the lengths of the tables of positions, learned or computed in advance, that text runs through."""
    words = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    found = []
    for name, module in text_part(model).named_modules():
        if re.search("vision|visual|image", name):  # a tower inside the text part, as GIT's
            continue
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and id(module) not in words and ("pos" in last or last == "wpe"):
            found.append(module.num_embeddings - int(getattr(module, "offset", 0)))  # OPT's begins with two rows unused
        for buffer, table in module.named_buffers(recurse=False):
            # sines and cosines: GPT-J's, CodeGen's and CTRL's
            if buffer in ("embed_positions", "pos_encoding") and table.dim() == 2:
                found.append(int(table.shape[0]))
    config = model.config.get_text_config()
    if getattr(getattr(config, "attn_config", None), "alibi", False):  # MPT's biases are computed in advance
        found.append(int(config.max_seq_len))
    return found
