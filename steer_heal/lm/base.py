"""The pristine model that everything else runs on, and access to its structure: blocks, text part, logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product, zip_longest
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steer_heal.config import ConfigError
from steer_heal.lm.chat import Chat, Variable

if TYPE_CHECKING:  # transformers takes seconds to import, and a run that finds everything in the store needs no model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base:
    """The pristine model, loaded on first use. Its weights change only while a view is open."""

    def __init__(
        self, fingerprint: str, fetch: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        template: Mapping[str, Variable] | None = None,
    ) -> None:  # fmt: skip
        self.fingerprint = fingerprint  # of weights, dtype, tokenizer, device type and attention implementation
        self._fetch = fetch
        self._template = template  # variables of the chat template

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Any]]:
        model, tokenizer = self._fetch()
        return model, tokenizer, seal(model, hooks=False)

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    @functools.cached_property
    def chat(self) -> Chat:
        """The conversations of its tokenizer."""
        return Chat(self.tokenizer, self._template)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks. Raises ConfigError if none are found."""
        return blocks_of(self.model)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a turn: the model's, the tokenizer's eos, and what the template ends a turn with."""
        generation = self.model.generation_config
        ids: Any = generation.eos_token_id if generation is not None else None
        listed = {*(ids if isinstance(ids, list) else [ids]), self.tokenizer.eos_token_id, *self.chat.end_ids}
        return frozenset(i for i in listed if i is not None and 0 <= i < vocabulary(self.model))

    @functools.cached_property
    def pad_id(self) -> int:
        """The id used for padding. Any id of the model will do: positions are masked by length, never by id."""
        there = [i for i in (self.tokenizer.pad_token_id, *sorted(self.end_ids)) if i is not None]
        return next((int(i) for i in there if 0 <= i < vocabulary(self.model)), 0)

    def check_pristine(self) -> None:
        """Raise RuntimeError if a module or weight is not the one that was loaded, or was written to.

        Hooks may have come: somebody may be watching.
        """
        self._check_seal(self._loaded[2], hooks=False)

    @contextmanager
    def untouched(self) -> Iterator[PreTrainedModel]:
        """Give the model, to be changed inside, with what it was restored inside. Raises RuntimeError if it was not."""
        before = seal(self.model)
        try:
            yield self.model
        finally:
            self._check_seal(before, hooks=True)

    def _check_seal(self, before: list[Any], hooks: bool) -> None:
        """Raise RuntimeError if the model differs; it is then forgotten, and loaded again by whoever needs it next."""
        changed = [then or now for now, then in zip_longest(seal(self.model, hooks), before) if now != then]
        if changed:
            for name in ("_loaded", "blocks"):
                vars(self).pop(name, None)
            raise RuntimeError(f"the base model was changed and is given up: {changed[0][0]} is not as it was")


def seal(model: nn.Module, hooks: bool = True) -> list[Any]:
    """Return what tells an untouched model: identity of modules and weights, writes to weights, and numbers of hooks.

    Taking it costs a millisecond for hundreds of weights, as no value is read.
    """
    modules = [
        (name, id(m), *((len(m._forward_hooks), len(m._forward_pre_hooks)) if hooks else ()))
        for name, m in model.named_modules()
    ]
    weights = model.named_parameters(remove_duplicate=False)
    return [*modules, *((name, id(p), p.data_ptr(), p._version) for name, p in weights)]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the model's modules, weights and instance attributes back as they were, whatever happens inside."""
    before = [
        (vars(module), {k: (v, dict(v) if isinstance(v, dict) else v) for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for now, held in before:
            now.clear()
            for name, (value, content) in held.items():
                now[name] = value
                if isinstance(value, dict):  # in place: whoever removes a hook holds this very dict
                    value.clear()
                    value.update(content)


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of ids that the model has a row of embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type, union-attr]


def body(model: PreTrainedModel) -> nn.Module:
    """Return what computes the states that the head reads; with towers beside it, if the model has any."""
    inner: nn.Module = model.base_model
    return inner if inner is not model else _bodies.get(model) or _below_head(model)


def _below_head(model: PreTrainedModel) -> nn.Module:
    """Find the outermost part that begins with the embeddings and lacks the head, and remember it.

    Some models name a base that they do not have, such as the text model of Llama 4.
    """
    first, last = id(model.get_input_embeddings()), id(model.get_output_embeddings())
    held = ((part, set(map(id, part.modules()))) for part in model.modules())
    found: nn.Module = next((part for part, ids in held if first in ids and last not in ids), model)
    _bodies[model] = found
    return found


_bodies: WeakKeyDictionary[PreTrainedModel, nn.Module] = WeakKeyDictionary()


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part that text runs through: in a multimodal model, the language model without its other towers."""
    named: Any = model.get_decoder()
    other: Any = getattr(model, "base_model", named)
    return other if not _lists(named, model) and _lists(other, model) else named  # ModernBERT names its head


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks: the first module list of the configured depth in the text part, whatever its name.

    Raises ConfigError if there is none.
    """
    found = _lists(text_part(model), model)
    if not found:
        depth = model.config.get_text_config().num_hidden_layers
        raise ConfigError(f"model: no list of {depth} decoder blocks found in {type(model).__name__}")
    return found[0]


def _lists(part: nn.Module, model: PreTrainedModel) -> list[nn.ModuleList]:
    depth = model.config.get_text_config().num_hidden_layers
    return [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Compute logits [n, v] in float32 from post-final-norm states [n, d], scaled and soft-capped as the model does."""
    scale, cap = _heads.get(model) or _forms(model)[0]
    logits: Tensor = model.get_output_embeddings()(states).float()
    if scale != 1:  # for most this would be a wasted pass over [n, v]
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


_heads: WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]] = WeakKeyDictionary()  # set by `check_head`


def _forms(model: PreTrainedModel) -> list[tuple[float, float | None]]:
    """Return the scales and caps that a model may apply to its logits, as its configuration says or parts of it."""
    config = model.config.get_text_config()

    def given(*names: str) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [value for value in values if value and isinstance(value, int | float)]

    scales = given("logit_scale") + [1 / value for value in given("logits_scaling", "logits_mup_width_multiplier")]
    caps = given("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return list(product([*scales, 1.0], [*caps, None]))  # Cohere multiplies, Granite divides; Gemma caps


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Find out how `head` gives the model's own logits, for it to do so. Raises ConfigError if it cannot."""
    ids = torch.arange(8, device=model.device)[None]
    own: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    states = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    allowed = (1e-3 if model.dtype == torch.float32 else 0.02) * float(own.norm())
    for form in _forms(model) if math.isfinite(allowed) else []:
        _heads[model] = form
        if float((head(model, states) - own).norm()) <= allowed:
            return
    kind = type(model).__name__
    raise ConfigError(f"model: {kind} computes its logits in a way that steer_heal.lm.base.head does not support")


@torch.no_grad()
def check_blocks(model: PreTrainedModel) -> None:
    """Raise ConfigError unless each block passes on one state per token (the one that is steered) and none looks ahead.

    A block that looks ahead would see the padding on the right of a batch, which no mask hides.
    """
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)
    wanted, found = [*ids.shape, model.config.get_text_config().hidden_size], list[list[int]]()
    streams = set[int]()

    def record(_module: nn.Module, _inputs: Any, out: Any) -> None:
        parts = [part for part in out if isinstance(part, Tensor)] if isinstance(out, tuple | list) else [out]
        found.append(list(parts[0].shape))
        streams.add(sum(part.shape == parts[0].shape for part in parts))

    hooks = [block.register_forward_hook(record) for block in blocks_of(model)]
    try:
        one, other = body(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :2].float()
    finally:
        for hook in hooks:
            hook.remove()
    kind = type(model).__name__
    if not (one.isfinite().all() and other.isfinite().all()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ConfigError(f"model: {kind}: its states overflow in {dtype}, though its weights are finite")
    if not found:
        raise ConfigError(f"model: text does not run through the blocks of {kind}; it cannot be steered")
    if max(streams) > 1:
        raise ConfigError(f"model: blocks of {kind} pass on {max(streams)} states a token; it cannot be steered")
    if odd := next((shape for shape in found if shape != wanted), None):
        raise ConfigError(f"model: blocks of {kind} pass on {odd}, not states {wanted}; it cannot be steered")
    if not float((one - other).norm()) <= 0.02 * float(one.norm()):
        raise ConfigError(f"model: {kind} looks ahead; it is not a causal language model")


def check_finite(model: PreTrainedModel) -> None:
    """Raise ConfigError for a weight that holds NaN or infinity, naming it: one row may matter to some tokens alone."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ConfigError(f"model: {type(model).__name__}: {name} is not finite: it holds NaN or infinity")
