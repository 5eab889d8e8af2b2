"""A model as the command line opens it, plain transformers' model of the same files, and what both are fed."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoConfig

from steer_heal.artifacts import SteeringVector
from steer_heal.config import CONF, build
from steer_heal.experiment import Experiment
from steer_heal.lm.base import Base
from steer_heal.lm.batch import Pair
from steer_heal.model import load, maker

CLOSE = 1e-3  # allowed distance, relative to the norm of the reference
LAYER = 1  # the block that is steered and looked at, of four: the states after it are no normed last ones
ATTENTION = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "qkv_proj",
    "Wqkv", "in_proj", "x_proj",
)  # fmt: skip


class Unlike(AssertionError):
    """A figure that is not plain transformers'."""


@dataclass(frozen=True)
class Subject:
    """Our model of a folder, and how to load plain transformers' model of the same files."""

    exp: Experiment
    base: Base
    model: str  # a folder, or a Hub id

    @cached_property
    def plain(self) -> Any:
        """The folder's model as transformers loads it. Weights stay as they are: checks that adapt take `copied`."""
        config = AutoConfig.from_pretrained(self.model)  # type: ignore[no-untyped-call]
        model = maker(config).from_pretrained(self.model, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def copied(self) -> Any:
        return copy.deepcopy(self.plain)

    @cached_property
    def block_names(self) -> list[str]:
        names = {id(module): name for name, module in self.base.model.named_modules()}
        return [names[id(block)] for block in self.base.blocks]

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Prompts of different lengths with completions of random ids."""
        rng, words = torch.Generator().manual_seed(0), len(self.base.tokenizer)
        texts = (("a", "b"), ("a persona", "What is it?"), ("a persona", "What do people do all day?"))
        prompts = [self.base.chat.prompt(*text) for text in texts]
        answers = [tuple(torch.randint(5, words, (n,), generator=rng).tolist()) for n in (7, 3, 10)]
        return tuple(Pair(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))

    @cached_property
    def vector(self) -> SteeringVector:
        width = self.base.model.config.get_text_config().hidden_size
        return SteeringVector(layers=(LAYER,), directions=torch.linspace(-1, 1, width)[None], snr=(1.0,))


def experiment(model: str, *overrides: str) -> Experiment:
    """Return the tiny experiment with a model of a folder or of the Hub, on few and short texts."""
    given = [
        "experiment=tiny", "reg=kl_rev", "tau=0", "model=hub", f"model.id='{model}'", "model.dtype=float32",
        "model.device=cpu", "dose.alpha=[1.0]", "heal.epochs=1", "heal.min_train=4", "heal.batch_size=4",
        "generate.max_new_tokens=6", *overrides,
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("config", given)
    OmegaConf.set_struct(composed, False)
    exp = build(composed)
    assert isinstance(exp, Experiment)
    trait, damage = exp.trait, exp.eval["damage"]
    part = {"generate": trait.generate[:8], "held_out": trait.held_out[:3], "probes": trait.probes[:3]}
    return exp.model_copy(
        update={
            "trait": trait.model_copy(update=part),
            "contexts": exp.contexts.model_copy(update={"prompts": exp.contexts.prompts[:6]}),
            "eval": exp.eval | {"damage": damage.model_copy(update={"texts": damage.texts[:2]})},  # type: ignore[attr-defined]
        }
    )


def opened(model: str, *overrides: str) -> Subject:
    """Check an experiment on a model as a command line does, and load it later. Raises ConfigError."""
    exp = experiment(model, *overrides)
    exp.prepare()
    load.cache_clear()  # as in a new process
    return Subject(exp, load(exp.model), model)


def targets_of(model: str) -> str | None:
    """Return the option that adapts attention alone, or a state space's inputs; None if there are no such layers."""
    modules = experiment(model).model.skeleton().named_modules()
    linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    found = [name for name in ATTENTION if name in linear]
    return f"lora.target_modules=[{','.join(found)}]" if found else None


def distance(found: Tensor, expected: Tensor, what: str) -> float:
    """Return the distance relative to the reference's norm. Raises Unlike if it is not small."""
    size = float(expected.double().norm())
    error = float((found.double() - expected.double()).norm()) / size if size else math.inf
    if not error <= CLOSE:
        raise Unlike(f"{what}: off by {error:.2g} of {size:.3g}")
    return error


@torch.no_grad()
def logits(model: Any, ids: tuple[int, ...]) -> Tensor:
    """The model's own logits [s, v] for one unpadded sequence, without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def logprobs(model: Any, pair: Pair) -> Tensor:
    values = logits(model, pair.prompt + pair.completion)[len(pair.prompt) - 1 : -1].log_softmax(-1)
    return values.gather(-1, torch.tensor(pair.completion)[:, None])[:, 0]
