"""The adapter of one round: PEFT's LoRA (Hu et al. 2021, arXiv:2106.09685) on the student's dense view."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from steer_heal.config import Config, ConfigError
from steer_heal.lm.base import blocks_of, text_part
from steer_heal.lm.fused_lora import fuse

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

    def peft_config(self, model: PreTrainedModel | None = None) -> peft.LoraConfig:
        """Return PEFT's configuration; given a model, with the adapted modules listed by their full names.

        By itself PEFT adapts every module whose name matches, even in an image tower, and every linear layer for
        all-linear.
        """
        import peft

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        if model is not None:
            kept = self._upper(model) if self.first else _within(model)
            targets = [
                name for name, m in _linear(model).items()
                if id(m) in kept and (targets == "all-linear" or any(_matches(name, t) for t in targets))
            ]  # fmt: skip
        return peft.LoraConfig(
            r=self.r, lora_alpha=self.alpha, target_modules=targets, lora_dropout=0.0,
            bias="none", task_type="CAUSAL_LM",
        )  # type: ignore[arg-type]  # fmt: skip


def _within(module: nn.Module) -> set[int]:
    """Return the `id` of a module and of all its submodules."""
    return {id(m) for m in module.modules()}


def _matches(name: str, target: str) -> bool:
    """Return True if a target is the full name of a module or the end of it."""
    return name == target or name.endswith(f".{target}")


def _linear(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers that text runs through before the head, by name."""
    from transformers.pytorch_utils import Conv1D

    inside = _within(text_part(model)) - {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    return {n: m for n, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)}


@contextmanager
def live_adapter(lora: Lora, model: PreTrainedModel, seed: int) -> Iterator[peft.PeftModel]:
    """Put a fresh, trainable float32 adapter into `model`; on exit the model has its own modules again.

    Raises ConfigError as `Lora.check_model` does, and if PEFT would adapt more than linear layers.
    """
    import peft

    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, lora.check_model(model).peft_config(model))
    originals: dict[nn.Module, nn.Parameter] = {}
    try:
        if wrapped.base_model.targeted_parameter_names:  # PEFT adds these itself, by the experts' former names
            raise ConfigError(
                f"lora.target_modules: PEFT adapts the stacked experts of {type(model).__name__}, which no view can "
                "sum; name layers outside the experts, such as [q_proj,o_proj]"
            )
        originals = fuse(wrapped)  # type: ignore[arg-type]
        yield wrapped  # type: ignore[misc]
    finally:
        for module, weight in originals.items():
            module.weight = weight
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


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
