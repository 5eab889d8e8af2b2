"""Small made-up inputs that the tests of the stages share."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.compose import composed
from steer_heal.artifacts import Adapter, Completion, Completions
from steer_heal.experiment import Experiment
from steer_heal.heal import heal
from steer_heal.heal.reference import Targets, reference_states
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.lora import Lora, config_record, factors, live_adapter
from steer_heal.reg import Regulariser
from steer_heal.reg.kl_fwd import KlFwd
from steer_heal.reg.kl_rev import KlRev
from steer_heal.reg.nll import Nll
from steer_heal.reg.wd import Wd
from steer_heal.runtime import Runtime
from steer_heal.store.checkpoint import Checkpoint

RUNTIME = Runtime(
    name="test",
    store=Path("unused"),
    micro_batch=3,
    score_batch=4,
    generate_batch=8,
    cuda_graphs=False,
    head_chunk=7,
    threads="auto",
    checkpoint_blocks=False,
    checkpoint_seconds=300,
)


@functools.cache
def preset(*overrides: str) -> Experiment:
    """The tiny experiment with overrides, composed once per process."""
    return composed("experiment=tiny", *overrides)


def runtime(**sizes: int) -> Runtime:
    """`RUNTIME` with other sizes."""
    return RUNTIME.model_copy(update=sizes)


def lora(r: int = 3, alpha: float | None = None, targets: Any = "all-linear", first: float = 0) -> Lora:
    """A small adapter; 3 differs from every size in the tiny model."""
    return Lora(name="test", r=r, lora_alpha=alpha, target_modules=targets, first=first)


def rows(n: int, seed: int = 0, *, prompt: int = 9, completion: int = 8, vocab: int = 400) -> Completions:
    """`n` kept completions of random ids, lengths from 1 up to the two given."""
    rng = torch.Generator().manual_seed(seed)

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (), generator=rng))
        return tuple(torch.randint(5, vocab, (length,), generator=rng).tolist())

    return Completions(
        rows=tuple(Completion(f"p{i}", ids(prompt), ids(completion), f"t{i}", 0.5, False, kept=True) for i in range(n))
    )


def adapter(base: Base, seed: int, r: int = 3, alpha: float | None = None, size: float = 0.1) -> Adapter:
    """A made-up adapter, both of whose factors are random, with a key as if published."""
    with live_adapter(lora(r, alpha), base.model, seed) as wrapped:
        drawn = {
            name: size * torch.randn(f.shape, generator=torch.Generator().manual_seed(seed * 1000 + i))
            for i, (name, f) in enumerate(sorted(factors(wrapped).items()))
        }
        record = config_record(wrapped)
    return Adapter(config=record, factors=drawn, curve=(), summary={}, key=f"made-up-{seed}")


def by_hand(student: Student) -> PreTrainedModel:
    """A copy of the base into which the student's adapters are added, one product at a time."""
    model = copy.deepcopy(student.base.model)
    with torch.no_grad():
        for learned in student.history:
            scale = learned.config["lora_alpha"] / learned.config["r"]
            for name in learned.modules():
                a, b = (learned.factors[f"{name}.lora_{side}.weight"] for side in "AB")
                model.get_submodule(name).weight += scale * b @ a  # type: ignore[operator]
    return model


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The two bfloat16 numbers around each float32 one, the smaller first, from the one that torch rounds to."""
    near = exact.bfloat16()
    beyond = near.float().abs() > exact.abs()
    inner = torch.where(beyond, (near.view(torch.int16) - 1).view(torch.bfloat16), near)
    outer = (inner.view(torch.int16) + 1).view(torch.bfloat16)
    return inner.float(), torch.where(exact == inner.float(), inner.float(), outer.float())


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of every weight, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: PreTrainedModel, before: dict[str, Tensor]) -> None:
    """Assert the same modules, and the same weights to the bit."""
    after = model.state_dict()
    assert after.keys() == before.keys(), f"other modules than before: {sorted(after.keys() ^ before.keys())[:4]}"
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not changed, f"weights that changed: {changed[:4]}"
    assert not hasattr(model, "peft_config"), "PEFT's configuration was left on the model"


def hooks_of(model: PreTrainedModel) -> dict[str, int]:
    """Number of hooks of each module."""
    found = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    return {name: count for name, count in found.items() if count}


@torch.no_grad()
def logits_of(model: Any, *ids: int) -> Tensor:
    """The model's own logits [s, v] for one unpadded sequence."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


@torch.no_grad()
def own_loss(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """Transformers' own loss of a completion: `labels` with the prompt masked, mean over its tokens."""
    ids = torch.tensor([prompt + completion])
    labels = torch.tensor([(-100,) * len(prompt) + completion])
    return float(model(input_ids=ids, labels=labels).loss)


def regulariser(name: str, lam: float = 1.0, tau: float = 0.0) -> Regulariser:
    """A regulariser by name; those without lam or tau ignore them."""
    options: dict[str, Regulariser] = {
        "nll": Nll(name="nll"),
        "kl_fwd": KlFwd(name="kl_fwd", lam=lam, tau=tau),
        "kl_rev": KlRev(name="kl_rev", lam=lam, tau=tau),
        "wd": Wd(name="wd", lam=lam, decay="round"),
    }
    return options[name]


def healed(
    student: Student, reg: Regulariser, *, reference: Student | None = None, made: Completions | None = None,
    held: Completions | None = None, seed: int = 0, how: Runtime = RUNTIME, size: Lora | None = None,
    log: Any = lambda row: None, checkpoint: Checkpoint | None = None, **config: Any,
) -> Adapter:  # fmt: skip
    """A short heal on random completions; `config` replaces fields of the tiny preset's training."""
    short = {"lr": 1e-2, "epochs": 1, "batch_size": 4, "n_keep": None, "min_train": 1, "measure_every": 1} | config
    options, made = preset().heal.model_copy(update=short), rows(8) if made is None else made
    anchor = lambda: reference_states(  # noqa: E731
        reference or student.pristine(), Targets.of(made.kept(), options.max_len), runtime=how
    )
    return heal(
        options, size or lora(), reg, student, anchor, made, rows(3, seed=9) if held is None else held, seed,
        runtime=how, log=log, checkpoint=checkpoint,
    )  # fmt: skip


def off(learned: Adapter) -> float:
    """How far the folded weights' states are from the live adapter's, relative to the states themselves."""
    return learned.summary["fold_error"] * learned.summary["state_change"]


def assert_alike(one: Adapter, other: Adapter, what: str) -> None:
    """Assert that curves and factors are equal up to rounding."""
    assert len(one.curve) == len(other.curve), f"{what}: {len(one.curve)} and {len(other.curve)} steps"
    for a, b in zip(one.curve, other.curve, strict=True):
        assert a.keys() == b.keys(), f"{what}: step {a['step']} has {a.keys() ^ b.keys()} in one curve only"
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), f"{what}: {name} of step {a['step']}"
    for name, factor in one.factors.items():
        torch.testing.assert_close(
            factor, other.factors[name], rtol=1e-2, atol=2e-3, msg=lambda m: f"{what}: {name}: {m}"
        )


def greedy(model: Any, prompt_ids: tuple[int, ...], n: int, end: list[int]) -> tuple[int, ...]:
    """Transformers' own greedy continuation of one unpadded prompt."""
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, eos_token_id=end,
        pad_token_id=4,
    )  # fmt: skip
    return tuple(out[0, len(prompt_ids) :].tolist())
