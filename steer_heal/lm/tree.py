"""Run texts as a tree of tokens: what texts begin with in common runs once, and nothing is padded.

A causal model's state at a token depends on the tokens up to it alone, so texts that begin alike are one path until
they part. The tokens of a tree lie in one row, text after text; each has the position that it has in its own text and
sees the tokens of its own path. In attention the row becomes a batch again: a token meets no other text's keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steer_heal.lm.attention import short_sequences
from steer_heal.lm.base import body
from steer_heal.lm.batch import Pair, by_length, collate, keys_alone, shared_states, states
from steer_heal.system.terminal import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST = 2048  # tokens of a tree: the mask that some families need grows with their square
# Names under which configurations hold how far a token sees, how many it selects, and how many a buffer is made for.
WINDOWS = (
    "sliding_window", "attention_chunk_size", "window_size", "local_attention", "index_topk", "max_position_embeddings",
)  # fmt: skip
ROW = 16  # tokens of a row of attention that are worth no division
ALLOWED = {torch.float32: 1e-3}  # of the states' norm, by which a tree may differ when it is tried; others: 0.05


@dataclass(frozen=True)
class Tree:
    """Texts merged: n tokens, of which each text's last is none, since it predicts nothing."""

    ids: Tensor  # [1, n]
    positions: Tensor  # [1, n], of each token in its text
    mask: Tensor  # [1, 1, n, n], 0 where a token sees another, and the dtype's least number elsewhere
    where: Tensor  # [m], the tokens that predict the completions, text after text
    rows: Tensor  # [r, s], for attention: tokens that a text adds to the tree, the last one repeated
    seen: Tensor  # [r, t], the tokens of their path, likewise
    seen_mask: Tensor  # [r, 1, s, t], as `mask`
    back: Tensor  # [n], where each token lies in the flattened [r * s]


def grow(pairs: Sequence[Pair], dtype: torch.dtype, device: torch.device) -> Tree:
    """Merge texts into a tree. Those that begin alike must be neighbours, as in sorted order, to share it."""
    ids, positions = list[int](), list[int]()
    where, added, paths = list[int](), list[range](), list[list[int]]()
    text, path = tuple[int, ...](), list[int]()
    # a longer run of tokens, such as one with a prompt, is several rows of attention: others are not padded to it
    most = max(*(max(len(pair.completion), len(pair) // 4) for pair in pairs), ROW)
    for pair in pairs:
        before, text = text, (*pair.prompt, *pair.completion[:-1])
        same = _same(before, text)
        new = range(len(ids), len(ids) + len(text) - same)
        path = path[:same] + list(new)
        ids += text[same:]
        positions += range(same, len(text))
        where += path[len(pair.prompt) - 1 :]
        for start in range(0, len(new), most):
            added.append(new[start : start + most])
            paths.append(path[: same + start + len(added[-1])])
    n, s, t = len(ids), max(map(len, added)), max(map(len, paths))
    hidden = torch.finfo(dtype).min
    mask = torch.full((n, n), hidden, dtype=dtype)
    rows, seen = torch.empty(len(added), s, dtype=torch.long), torch.empty(len(added), t, dtype=torch.long)
    seen_mask, back = torch.full((len(added), 1, s, t), hidden, dtype=dtype), torch.empty(n, dtype=torch.long)
    for r, (new, path) in enumerate(zip(added, paths, strict=True)):
        of, shared = torch.tensor(path), len(path) - len(new)
        sees = torch.full((len(new), len(path)), hidden, dtype=dtype).triu(shared + 1)
        mask[new.start : new.stop].index_copy_(1, of, sees)
        rows[r], seen[r] = new[-1], path[-1]
        rows[r, : len(new)], seen[r, : len(path)] = of[shared:], of
        seen_mask[r, 0, : len(new), : len(path)] = sees
        seen_mask[r, 0, len(new) :, 0] = 0  # a repeated token sees something, so that softmax has a sum
        back[new.start : new.stop] = r * s + torch.arange(len(new))
    tensors = (torch.tensor(ids)[None], torch.tensor(positions)[None], mask[None, None], torch.tensor(where))
    return Tree(*(tensor.to(device) for tensor in (*tensors, rows, seen, seen_mask, back)))


@contextmanager
def _in_branches(tree: Tree) -> Iterator[None]:
    """Make attention that transformers calls by the name sdpa see each text's tokens as a row of a batch.

    It does so where a family hands on the tree's own mask and nothing else about positions. Elsewhere the mask alone
    decides what a token sees, at the price of products with all tokens of the tree.
    """
    from transformers import AttentionInterface

    own: Callable[..., Any] = AttentionInterface()["sdpa"]
    n, (r, s), t = tree.ids.shape[1], tree.rows.shape, tree.seen.shape[1]

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
    ) -> tuple[Tensor, None]:
        """Attention of q [1, h, n, d] to k and v [1, g, n, d]; returns [1, n, h, d]."""
        ours = attention_mask is not None and attention_mask.data_ptr() == tree.mask.data_ptr()
        if not ours or how.get("position_bias") is not None or query.shape[2] != n or key.shape[2] != n:
            found, _ = own(module, query, key, value, attention_mask, **how)
            return found, None

        def of(tokens: Tensor, which: Tensor, length: int) -> Tensor:
            picked = tokens[0].transpose(0, 1).index_select(0, which.flatten())  # [r length, h, d]
            return picked.view(r, length, *picked.shape[1:]).transpose(1, 2)

        found, _ = own(
            module, of(query, tree.rows, s), of(key, tree.seen, t), of(value, tree.seen, t), tree.seen_mask, **how
        )
        return found.flatten(0, 1).index_select(0, tree.back)[None], None

    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", own)


def _run(model: PreTrainedModel, tree: Tree) -> Tensor:
    """Return post-final-norm states [m, d] at the positions that predict the completions."""
    with _in_branches(tree):
        found: Tensor = body(model)(
            input_ids=tree.ids, attention_mask=tree.mask, position_ids=tree.positions, use_cache=False
        ).last_hidden_state
    return found[0].index_select(0, tree.where)


@torch.no_grad()
def completion_states(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, size: int, advance: Callable[[int], None]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices of some of the pairs, and the states [n, d] that predict their completions, one pair after another.

    At most `size` texts run at once, as a tree if the model allows it, and as a padded batch otherwise; the states are
    those of each text alone within rounding.
    """
    most = room(model, max(map(len, pairs), default=0))
    for group in _groups(pairs, size, most) if most else by_length(pairs, size):
        some = [pairs[i] for i in group]
        with short_sequences(model):  # not around the yield: whoever stops asking would leave it open
            if most and len(group) > 1:
                found = _run(model, grow(some, model.dtype, model.device))
            else:
                found = shared_states(model, collate(some, pad_id, model.device))
        yield group, found
        advance(len(group))


def states_of_each(model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, size: int, what: str) -> list[Tensor]:
    """Return `completion_states` of each pair [c, d], on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    with bar(what, len(pairs)) as advance:
        for group, hidden in completion_states(model, pairs, pad_id=pad_id, size=size, advance=advance):
            lengths = [len(pairs[i].completion) for i in group]
            for i, part in zip(group, hidden.cpu().split(lengths), strict=True):
                found[i] = part.clone()  # a view would keep the whole group's alive
    return found


def _groups(pairs: Sequence[Pair], size: int, most: int) -> Iterator[list[int]]:
    """Yield the pairs' indices in sorted order, in groups of at most `size` texts and, if several, `most` tokens."""
    texts = [pair.prompt + pair.completion[:-1] for pair in pairs]
    group, n = list[int](), 0
    for i in sorted(range(len(pairs)), key=lambda i: texts[i]):
        more = len(texts[i]) - (_same(texts[group[-1]], texts[i]) if group else 0)
        if group and (len(group) == size or n + more > most):
            yield group
            group, n, more = [], 0, len(texts[i])
        group.append(i)
        n += more
    if group:
        yield group


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two texts begin with."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def room(model: PreTrainedModel, longest: int) -> int:
    """Return how many tokens a tree of texts may have; 0 if the model does not run it as it runs each text."""
    if not keys_alone(model, longest):
        return 0
    if model not in _trees:
        _trees[model] = _agrees(model)
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in WINDOWS]
    return min([MOST, *(limit for limit in limits if isinstance(limit, int) and limit > 0)]) if _trees[model] else 0


_trees: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # whether each model runs them


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Return True if a small tree gives the states that its texts give one by one."""
    if "position_ids" not in inspect.signature(body(model).forward).parameters:
        return False
    texts = [
        Pair((1, 2, 3), (4, 5, 6)),
        Pair((1, 2, 3), (5, 1, 2, 7, 3)),
        Pair((1, 2, 4, 1), (2, 6)),
        Pair((3, 1), (2,)),
    ]
    plain = torch.cat([states(model, collate([text], 0, model.device)) for text in texts]).float()
    try:
        found = _run(model, grow(texts, model.dtype, model.device)).float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # of a family without such masks
        return False
    return float((found - plain).norm()) <= ALLOWED.get(model.dtype, 0.05) * float(plain.norm())
