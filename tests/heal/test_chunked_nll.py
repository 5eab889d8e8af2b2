"""nll, divergence and their gradients at completion positions against float64 autograd over the full logits."""

from __future__ import annotations

import copy
import functools
import itertools
import typing
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from steer_heal.config import ConfigError
from steer_heal.heal.chunked_nll import positions
from steer_heal.lm.base import check_head, head
from steer_heal.lm.divergence import Aggregator, aggregate
from steer_heal.lm.kl import kl_of_states
from steer_heal.lm.score import even
from steer_heal.reg import Regulariser
from steer_heal.reg.kl_fwd import KlFwd
from steer_heal.reg.kl_rev import KlRev
from steer_heal.reg.nll import Nll
from steer_heal.reg.wd import Wd

LENGTHS = [1, 5, 9, 3, 2]
N, D, V = sum(LENGTHS), 16, 50
REGS = ["kl_fwd", "kl_rev", "nll", "wd"]
SIZE = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": V}
GROUPED = {**SIZE, "num_key_value_heads": 1}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name: configuration, and what its head does beyond a product
    "llama": ("LlamaConfig", GROUPED),
    "capped": ("Gemma2Config", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 1.5}),
    "biased": ("PhiConfig", SIZE),
    "divided": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0}),
    "multiplied": ("CohereConfig", GROUPED),
}


@functools.cache
def family(name: str) -> PreTrainedModel:
    kind, fields = FAMILIES[name]
    config = getattr(transformers, kind)(**fields, **NO_IDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def regulariser(name: str, tau: float = 0.0) -> Regulariser:
    return {
        "kl_fwd": KlFwd(name="kl_fwd", lam=0.7, tau=tau),
        "kl_rev": KlRev(name="kl_rev", lam=0.7, tau=tau),
        "nll": Nll(name="nll"),
        "wd": Wd(name="wd", lam=0.7, decay="round"),
    }[name]


@functools.cache
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(N, D, generator=rng), torch.randint(0, V, (N,), generator=rng)
    return hidden, hidden + 0.4 * torch.randn(N, D, generator=rng), targets


def full_logits(model: Any, hidden: Tensor) -> Tensor:
    """The whole [n, v] in float64, with what each family does to it, written out."""
    embedding = model.get_output_embeddings()
    logits = hidden.double() @ embedding.weight.double().T
    if embedding.bias is not None:
        logits = logits + embedding.bias.double()
    cap, divisor, factor = (
        getattr(model.config, k, None) for k in ("final_logit_softcapping", "logits_scaling", "logit_scale")
    )
    logits = logits / divisor if divisor else logits * factor if factor else logits
    return torch.tanh(logits / cap) * cap if cap else logits


def plain_divergence(name: str, logits: Tensor, fixed: Tensor) -> Tensor:
    q, p = Categorical(logits=logits), Categorical(logits=fixed)
    return {"kl_fwd": kl_divergence(p, q), "kl_rev": kl_divergence(q, p)}.get(name, torch.zeros(N).double())


def plain_aggregate(values: Tensor, how: str) -> Tensor:
    one = {
        "mean": lambda x: x.sum() / len(x),
        "rmse": lambda x: (x.square().sum() / len(x)).sqrt(),
        "p95": lambda x: x.quantile(0.95),
        "max": lambda x: x.sort().values[-1],
    }[how]
    return torch.stack([one(part) for part in torch.split(values, LENGTHS)])


@pytest.mark.parametrize("name", FAMILIES)
def test_head_gives_the_models_own_logits(name: str) -> None:
    """Reference: the model's own forward, whatever its family does after the output embeddings."""
    model, ids = family(name), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        ours = head(model, model.base_model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(ours, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    check_head(model)


def test_a_head_that_does_more_is_refused() -> None:
    """Reference: a model that doubles its logits after the embeddings, as some families do by a factor of their own."""
    model, inner = copy.deepcopy(family("llama")), family("llama").get_output_embeddings()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    model.get_output_embeddings = lambda: inner  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes its logits in a way that"):
        check_head(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "how"),
    [*itertools.product(["kl_fwd", "kl_rev"], typing.get_args(Aggregator)), ("nll", "mean"), ("wd", "mean")],
)
def test_values_and_gradients(name: str, kind: str, how: Aggregator) -> None:
    """Reference: float64 autograd through the full logits, torch.distributions, and the hinge written out."""
    model, (hidden, reference, targets) = family(name), drawn()
    exact = hidden.double().requires_grad_()
    logits = full_logits(model, exact)
    nll_64 = -logits.log_softmax(-1)[torch.arange(N), targets]
    d_64 = plain_divergence(kind, logits, full_logits(model, reference))
    per_sequence = plain_aggregate(d_64, how)
    tau = float(per_sequence.detach().median()) * 0.999 if kind.startswith("kl") else 0.0  # some pay and some do not
    hinge = 0.7 * (per_sequence - tau).clamp(min=0) if kind.startswith("kl") else 0 * per_sequence
    loss_64 = (plain_aggregate(nll_64, "mean") + hinge).mean()
    (slope_64,) = torch.autograd.grad(loss_64, exact)

    state, reg = hidden.clone().requires_grad_(), regulariser(kind, tau)
    nll, d, _ = positions(model, state, reference, targets, reg, chunk=6)
    loss = (aggregate(nll, LENGTHS, "mean") + reg.penalty(aggregate(d, LENGTHS, how))).mean()
    (slope,) = torch.autograd.grad(loss, state)
    if kind.startswith("kl"):
        assert 0 < int((hinge > 0).sum()) < len(LENGTHS), "this test needs sequences on both sides of tau"
    for what, ours, theirs in (("nll", nll, nll_64), ("divergence", d, d_64), ("loss", loss, loss_64)):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4, msg=lambda m: f"{what}: {m}")
    size = slope_64.abs().max().item()
    torch.testing.assert_close(slope.double(), slope_64, atol=2e-5 * size, rtol=1e-3, msg=lambda m: f"gradient: {m}")


@pytest.mark.parametrize("kind", REGS)
def test_chunk_size_changes_nothing(kind: str) -> None:
    """Reference: all positions in one pass."""
    model, (hidden, reference, targets) = family("capped"), drawn()
    found = []
    for chunk in (N + 100, N, 7, 1):
        state = hidden.clone().requires_grad_()
        nll, d, _ = positions(model, state, reference, targets, regulariser(kind), chunk)
        weights = torch.linspace(-1, 1, N)
        (slope,) = torch.autograd.grad((weights * nll).sum() + (weights.flip(0) * d).sum(), state)
        found.append((chunk, torch.cat([nll[:, None], d[:, None], slope], dim=-1)))
    for chunk, values in found[1:]:
        torch.testing.assert_close(values, found[0][1], atol=1e-5, rtol=1e-4, msg=lambda m: f"chunk {chunk}: {m}")


@pytest.mark.parametrize("how", typing.get_args(Aggregator))
@pytest.mark.parametrize("kind", ["kl_fwd", "kl_rev"])
def test_a_student_that_is_its_reference_pays_nothing(kind: str, how: Aggregator) -> None:
    """Reference: KL(p || p) = 0 to the last bit, and a finite gradient there, whatever the aggregator."""
    hidden, _, targets = drawn()
    state = hidden.clone().requires_grad_()
    nll, d, _ = positions(family("llama"), state, hidden, targets, regulariser(kind), chunk=4)
    assert d.abs().max() == 0, f"divergence from itself: {d.abs().max()}"
    (slope,) = torch.autograd.grad((nll.mean() + aggregate(d, LENGTHS, how).sum()), state)
    assert slope.isfinite().all(), f"{how}: {int((~slope.isfinite()).sum())} entries of the gradient are not finite"


@pytest.mark.parametrize("name", ["llama", "capped"])
def test_kl_of_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: torch.distributions in float64 over the full logits."""
    model, (hidden, reference, targets) = family(name), drawn()
    logits, fixed = full_logits(model, hidden), full_logits(model, reference)
    monkeypatch.setattr("steer_heal.lm.kl.parts", lambda _, states: even(len(states), 5))
    likely, found = kl_of_states(model, hidden, reference, targets)
    expected = fixed.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(likely.double(), expected.double(), atol=2e-5, rtol=1e-4)
    theirs = plain_divergence("kl_rev", logits, fixed)
    torch.testing.assert_close(found.double(), theirs, atol=2e-5, rtol=1e-4)
    _, same = kl_of_states(model, hidden, hidden, targets)
    assert torch.equal(same, torch.zeros_like(same)), "a model differs from itself"


class Largest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary that an operation made."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[-1] == V:
                self.rows = max(self.rows, tensor.shape[0] if tensor.shape[0] != D else 0)  # [d, v] is the head itself
        return out


@pytest.mark.parametrize("chunk", [1, 6])
@pytest.mark.parametrize("kind", REGS)
def test_logits_of_all_positions_never_stand_together(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the rows that go into the head, and the rows of every [., v] tensor made forward and backward."""
    model, (hidden, reference, targets) = family("llama"), drawn()
    head_rows: list[int] = []
    inner = model.get_output_embeddings()

    def recorder(states: Tensor) -> Tensor:
        head_rows.append(len(states))
        return inner(states)  # type: ignore[no-any-return,operator]

    monkeypatch.setattr(model, "get_output_embeddings", lambda: recorder)
    monkeypatch.setattr("steer_heal.lm.kl.parts", lambda _, states: even(len(states), chunk))
    state = hidden.clone().requires_grad_()
    with Largest() as seen:
        nll, d, _ = positions(model, state, reference, targets, regulariser(kind), chunk)
        (nll.mean() + aggregate(d, LENGTHS, "mean").sum()).backward()  # type: ignore[no-untyped-call]
        kl_of_states(model, hidden, reference, targets)
    most = max(part.stop - part.start for part in even(N, chunk))
    assert max(head_rows) == most <= chunk, f"the head ran on {max(head_rows)} positions at once, not {most}"
    assert 0 < seen.rows <= chunk, f"a tensor of [{seen.rows}, vocabulary] was made, {chunk} rows were allowed"
    passes = (2 if kind.startswith("kl") else 1) + 2
    assert sum(head_rows) == passes * N, f"{sum(head_rows)} positions went through the head, not {passes} x {N}"
