"""The adapter of one round: PEFT's LoRA (Hu et al. 2021, arXiv:2106.09685) on the student's dense view."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from steer_heal.config import Config, ConfigError
from steer_heal.lm.base import blocks_of, restored, text_part
from steer_heal.lm.fused_lora import fuse
from steer_heal.system.terminal import warn_once

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel


class Lora(Config, key="steer_heal.lora.Lora"):
    """Size and place of the adapter. B starts at 0, so training starts from no change; no dropout."""

    name: str
    r: int = Field(ge=1)  # rank
    lora_alpha: float | None = Field(gt=0)  # scaling is lora_alpha / r; null: 2 r
    # PEFT's names; all-linear leaves the head out
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)]
    first: float = Field(ge=0, lt=1)  # share of the depth below which blocks are frozen and run only once a round

    def key_fields(self) -> dict[str, Any]:
        """Return the fields with the scaling resolved and target modules as a sorted set."""
        targets = self.target_modules if isinstance(self.target_modules, str) else sorted(set(self.target_modules))
        return {"r": self.r, "lora_alpha": self.alpha, "target_modules": targets, "first": self.first}

    @property
    def alpha(self) -> float:
        return 2.0 * self.r if self.lora_alpha is None else self.lora_alpha

    def check_model(self, model: PreTrainedModel) -> Self:
        """Raise ConfigError for target modules that text does not run through, that are not linear layers inside the
        blocks, or that lie entirely below `first`.

        This runs before PEFT sees the model, because PEFT leaves a model half wrapped when it fails midway. `head`
        assumes that the head is frozen, and an `Adapter` holds nothing but pairs of factors.
        """
        if self.target_modules == "all-linear":
            return self
        linear, named = _linear(model), dict(model.named_modules())
        on_path = _within(text_part(model)) | {id(model.get_output_embeddings())}
        for target in self.target_modules:
            matching = [name for name in named if _matches(name, target)]
            found = [name for name in matching if id(named[name]) in on_path]
            if not found or not set(found) <= linear.keys():
                absent = "is not a module that text runs through" if matching else "is not in the model"
                reason = "is not a linear layer inside the blocks" if found else absent
                there = sorted({name.rpartition(".")[2] for name in linear})
                raise ConfigError(
                    f"lora.target_modules={list(self.target_modules)} is not allowed: {target} {reason}; "
                    f"there are {', '.join(there)}"
                )
            if self.first and not self._upper(model) & {id(named[name]) for name in found}:
                raise ConfigError(
                    f"lora.first={self.first:g} is not allowed: {target} of lora.target_modules is in no block from "
                    f"{self.lowest(model)} on"
                )
        return self

    def _upper(self, model: PreTrainedModel) -> set[int]:
        """Return the `id` of every module in the blocks that may be adapted."""
        return {i for block in blocks_of(model)[self.lowest(model) :] for i in _within(block)}

    def lowest(self, model: PreTrainedModel) -> int:
        """Return the index of the lowest adapted block."""
        return int(round(self.first * len(blocks_of(model)), 6)) if self.first else 0

    def peft_config(self, model: PreTrainedModel | None = None, without: Collection[str] = ()) -> peft.LoraConfig:
        """Return PEFT's configuration; given a model, with the adapted modules listed by their full names.

        By itself PEFT adapts every module whose name matches, even in an image tower, and every linear layer for
        all-linear. `without`: last parts of names that are left out.
        """
        import peft

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        if model is not None:
            kept = self._upper(model) if self.first else _within(model)
            targets = [
                name for name, m in _linear(model).items()
                if id(m) in kept and name.rpartition(".")[2] not in without
                and (targets == "all-linear" or any(_matches(name, t) for t in targets))
            ]  # fmt: skip
        return peft.LoraConfig(
            r=self.r, lora_alpha=self.alpha, target_modules=targets, lora_dropout=0.0,
            bias="none", task_type="CAUSAL_LM",
        )  # type: ignore[arg-type]  # fmt: skip

    def check_fits(self, model: PreTrainedModel) -> None:
        """Put the adapter on a model and take it off again. Raises ConfigError if that cannot be done.

        Layers of the model that get no adapter are named in a warning, once.
        """
        self.check_model(model)
        reasons = self.left_out(model)
        if stacked := sorted({".".join(name.split(".")[-2:]) for name in _stacked(model)}):
            reasons[f"the stacked experts ({', '.join(stacked)})"] = "no view can add to them what was learned"
        odd = sorted(_kinds(_linear(model, odd=True)) - _kinds(_linear(model)))
        if odd and self.target_modules == "all-linear":
            reasons[", ".join(odd)] = "more than a product, or at several places"
        if reasons:
            told = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
            warn_once(f"lora: some layers of {type(model).__name__} get no adapter: {told}")

    def left_out(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the layers that the adapter cannot have, by the last part of their names, with reasons.

        There are none where PEFT takes all. The model is given back as it was. Raises ConfigError as
        `_refused_alone` does.
        """
        try:
            with restored(model):
                _wrap(self, model, ())
        except ConfigError as error:
            return self._refused_alone(model, str(error))
        return {}

    def _refused_alone(self, model: PreTrainedModel, refusal: str) -> dict[str, str]:
        """Return the kinds of layers that PEFT refuses, with its reasons.

        Each is tried alone, and the model is given back as it was. Raises ConfigError, with the `refusal` of all,
        for layers that were asked for by name, and if nothing is left.
        """
        every = self.model_copy(update={"target_modules": "all-linear"})
        kinds = sorted(_kinds(every.peft_config(model).target_modules or ()))
        reasons = {}
        for kind in kinds:
            with restored(model):
                try:
                    _wrap(every, model, set(kinds) - {kind})
                except ConfigError as error:
                    reasons[kind] = str(error)
        fit = [kind for kind in kinds if kind not in reasons]
        if self.target_modules != "all-linear" or not fit:
            others = f"there are {', '.join(fit)}" if fit else "it has no layer that an adapter fits"
            raise ConfigError(
                f"lora.target_modules={self._given} is not allowed for {type(model).__name__}: {refusal}; {others}"
            )
        return reasons

    @property
    def _given(self) -> str:
        return self.target_modules if isinstance(self.target_modules, str) else f"[{','.join(self.target_modules)}]"


def _within(module: nn.Module) -> set[int]:
    """Return the `id` of a module and of all its submodules."""
    return {id(m) for m in module.modules()}


def _matches(name: str, target: str) -> bool:
    """Return True if a target is the full name of a module or the end of it."""
    return name == target or name.endswith(f".{target}")


def _linear(model: PreTrainedModel, odd: bool = False) -> dict[str, nn.Module]:
    """Return the linear layers that text runs through before the head, by name.

    Left out, unless `odd`: those that return more than a product, and a layer that stands at several places, since an
    adapter would stand at one of them, and its sum at all.
    """
    from transformers.pytorch_utils import Conv1D

    inside = _within(text_part(model)) - {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    found = {n: m for n, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)}
    return {n: m for n, m in found.items() if odd or (places[id(m)] == 1 and _gives_a_tensor(m))}


def _kinds(layers: Iterable[str]) -> set[str]:
    """Return the last parts of names."""
    return {name.rpartition(".")[2] for name in layers}


@torch.no_grad()
def _gives_a_tensor(layer: nn.Module) -> bool:
    """Return False for a layer of a model's own making that returns more than its product, as some routers do."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    assert isinstance(layer, nn.Linear)
    try:
        return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), Tensor)
    except (TypeError, ValueError, LookupError, RuntimeError):  # it takes more than its input
        return False


def _stacked(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights of experts that are kept as one tensor [experts, ...] inside the blocks."""
    return [
        name for name, p in blocks_of(model).named_parameters()
        if p.dim() == 3 and "expert" in name.rpartition(".")[0]
    ]  # fmt: skip


def _wrap(lora: Lora, model: PreTrainedModel, without: Collection[str]) -> peft.PeftModel:
    """Put an adapter into `model`, all layers but `without`. Raises ConfigError, with the model left half wrapped."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set", category=UserWarning)  # PEFT corrects it
        warnings.filterwarnings("ignore", message=".*pattern keys did not match", category=RuntimeWarning)
        try:
            wrapped = peft.get_peft_model(model, lora.peft_config(model, without))
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:  # PEFT's, of many kinds
            reason = " ".join(str(error).split()).split(". ")[0]
            raise ConfigError(f"PEFT refuses it: {reason:.200}") from error
    if wrapped.base_model.targeted_parameter_names:  # type: ignore[union-attr]  # PEFT adds these by former names
        raise ConfigError("PEFT takes it for a stacked expert, to which no view can add what was learned")
    return wrapped  # type: ignore[return-value]


@contextmanager
def live_adapter(lora: Lora, model: PreTrainedModel, seed: int) -> Iterator[peft.PeftModel]:
    """Put a fresh, trainable float32 adapter into `model`; on exit, or on failure, the model is as it was.

    Raises ConfigError as `Lora.check_fits` does.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), restored(model):
        without = lora.check_model(model).left_out(model)
        torch.manual_seed(seed)
        wrapped = _wrap(lora, model, without)
        fuse(wrapped)
        yield wrapped


def factors(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """Return the adapter's matrices on the CPU in float32, keyed by the name of their module in the model."""
    import peft

    state = peft.get_peft_model_state_dict(wrapped)
    return {k.removeprefix("base_model.model."): v.detach().float().cpu().clone() for k, v in state.items()}


def config_record(wrapped: peft.PeftModel) -> dict[str, Any]:
    """Return PEFT's own configuration of the adapter, as written to `adapter_config.json`."""
    record = wrapped.peft_config["default"].to_dict() | {"inference_mode": True}
    plain = lambda value: sorted(value) if isinstance(value, set) else str(value)  # noqa: E731
    loaded: dict[str, Any] = json.loads(json.dumps(record, default=plain))
    return loaded
