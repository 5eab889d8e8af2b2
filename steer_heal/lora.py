"""The adapter of one round: PEFT's LoRA (Hu et al. 2021, arXiv:2106.09685) on the student's dense view."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import peft
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from steer_heal.config import Config


class Lora(Config):
    """Size and place of the adapter. B starts at 0, so that it starts as no change; no dropout."""

    name: str
    r: int = Field(ge=1)  # rank
    lora_alpha: float | None = Field(gt=0)  # scaling is lora_alpha / r; null: 2 r
    target_modules: Literal["all-linear"] | tuple[str, ...]  # PEFT's names; all-linear leaves the head out

    def peft_config(self) -> peft.LoraConfig:
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return peft.LoraConfig(
            r=self.r, lora_alpha=self.lora_alpha or 2 * self.r, target_modules=targets, lora_dropout=0.0,
            bias="none", task_type="CAUSAL_LM",
        )  # type: ignore[arg-type]  # fmt: skip


@contextmanager
def live_adapter(lora: Lora, model: PreTrainedModel, seed: int) -> Iterator[peft.PeftModel]:
    """Put a fresh, trainable float32 adapter into `model`; afterwards the model has its own modules again."""
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, lora.peft_config())
    try:
        yield wrapped  # type: ignore[misc]
    finally:
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def factors(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """The adapter's matrices on the CPU in float32, named by the module inside the model."""
    state = peft.get_peft_model_state_dict(wrapped)
    return {k.removeprefix("base_model.model."): v.detach().float().cpu().clone() for k, v in state.items()}


def config_record(wrapped: peft.PeftModel) -> dict[str, Any]:
    """PEFT's own configuration of the adapter, as it stands in `adapter_config.json`."""
    record = wrapped.peft_config["default"].to_dict() | {"inference_mode": True}
    plain = lambda value: sorted(value) if isinstance(value, set) else str(value)  # noqa: E731
    loaded: dict[str, Any] = json.loads(json.dumps(record, default=plain))
    return loaded
