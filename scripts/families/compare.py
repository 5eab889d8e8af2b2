"""Our path through a model in a folder, each part compared with plain transformers and PEFT on the same files.

The reference never uses steer_heal's code: it runs one unpadded sequence at a time without a cache, adds the vector by
hand to what enters the next block, and trains PEFT's own layers by autograd through the model's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from families.subject import CLOSE, LAYER, Subject, Unlike, distance, logits, logprobs
from steer_heal.artifacts import Adapter
from steer_heal.experiment import Experiment
from steer_heal.heal.reference import Targets, reference_states
from steer_heal.heal.training import Training
from steer_heal.lm.activations import last_token_states
from steer_heal.lm.batch import Pair
from steer_heal.lm.decode import decode
from steer_heal.lm.frozen_blocks import freeze, training_blocks
from steer_heal.lm.hooks import steered
from steer_heal.lm.score import score
from steer_heal.lm.student import Student
from steer_heal.loop import run
from steer_heal.lora import config_record, factors, live_adapter
from steer_heal.store import Store
from steer_heal.tracker.jsonl import JsonlConfig

STEPS = 5  # tokens decoded
Changes = dict[int, Callable[[Tensor], Tensor | None]]  # block -> what is done with the states that come out of it


def scores(subject: Subject) -> float:
    """Log-probabilities of completions."""
    found = score(subject.base.model, subject.pairs, pad_id=subject.base.pad_id, micro_batch=3)
    return distance(torch.cat(found), torch.cat([logprobs(subject.plain, p) for p in subject.pairs]), "log-probs")


def many_scores(subject: Subject) -> float:
    """Log-probabilities of nine longer texts that begin alike, run as one tree where the model allows it."""
    rng, words = torch.Generator().manual_seed(1), len(subject.base.tokenizer)
    pairs = [
        Pair(pair.prompt, tuple(torch.randint(5, words, (40,), generator=rng).tolist()))
        for pair in subject.pairs
        for _ in range(3)
    ]
    found = score(subject.base.model, pairs, pad_id=subject.base.pad_id, micro_batch=len(pairs))
    return distance(torch.cat(found), torch.cat([logprobs(subject.plain, p) for p in pairs]), "log-probs of many")


def decoding(subject: Subject) -> float:
    """Logits of every step of greedy decoding; the second row leaves after its second token."""
    base, seen = subject.base, list[tuple[int, int, Tensor]]()
    prompts = [pair.prompt for pair in subject.pairs]
    end = min(base.end_ids)

    def likeliest(values: Tensor, rows: Tensor, step: int) -> Tensor:
        seen.extend((i, step, values[k].clone()) for k, i in enumerate(rows.tolist()))
        values[:, sorted(base.end_ids)] = -math.inf
        return torch.where((rows == 1) & (step == 1), end, values.argmax(-1))

    said = decode(base, prompts, None, torch.zeros(len(prompts)), likeliest, STEPS, lambda _: None)
    if [len(row) for row in said] != [STEPS, 2, STEPS]:
        raise Unlike(f"decoding: rows of {[len(row) for row in said]} tokens")
    worst = 0.0
    for i, step, values in seen:
        if step < len(said[i]):
            expected = logits(subject.plain, (*prompts[i], *said[i][:step]))[-1]
            worst = max(worst, distance(values, expected, f"logits of row {i}, step {step}"))
    return worst


@torch.no_grad()
def states(subject: Subject) -> float:
    """States at the last prompt token, as they enter the next block; they are among those that the model reports."""
    prompts, layers, model = [pair.prompt for pair in subject.pairs], (LAYER, 0), subject.plain
    found, worst = last_token_states(subject.base, prompts, layers, subject.exp.runtime), 0.0
    for prompt, ours in zip(prompts, found, strict=True):
        caught: dict[int, Tensor] = {}
        looks: Changes = {layer: lambda h, layer=layer: caught.update({layer: h[0, -1].float()}) for layer in layers}  # type: ignore[misc]
        with _entering(subject, model, looks):
            shown = getattr(model(input_ids=torch.tensor([prompt]), output_hidden_states=True), "hidden_states", None)
        for layer, state in zip(layers, ours, strict=True):
            worst = max(worst, distance(state, caught[layer], f"states after block {layer}"))
            reported = [one[0, -1].float() for one in shown or () if one.shape[-1] == len(state)]
            if reported and not any(torch.allclose(one, state, rtol=CLOSE, atol=CLOSE) for one in reported):
                raise Unlike(f"states after block {layer}: not among the model's own hidden states")
    return worst


@contextmanager
def _entering(subject: Subject, model: Any, changes: Changes) -> Iterator[None]:
    """Look at, or replace, the states that come out of blocks where they enter the next."""

    def hook(change: Callable[[Tensor], Tensor | None]) -> Any:
        def before(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            new = change(given[0] if given else named["hidden_states"])
            if new is None:
                return None
            return ((new, *given[1:]), named) if given else (given, named | {"hidden_states": new})

        return before

    hooks = [
        model.get_submodule(subject.block_names[layer + 1]).register_forward_pre_hook(hook(change), with_kwargs=True)
        for layer, change in changes.items()
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def steering(subject: Subject) -> float:
    """Log-probabilities with the vector added after a block, against the vector added to what enters the next."""
    shift, plain = subject.vector.directions[0], subject.plain
    with steered(subject.base, subject.vector, 1.0):
        found = score(subject.base.model, subject.pairs, pad_id=subject.base.pad_id, micro_batch=3)
    before = torch.cat([logprobs(plain, pair) for pair in subject.pairs])
    with _entering(subject, plain, {LAYER: lambda h: h + shift}):
        expected = torch.cat([logprobs(plain, pair) for pair in subject.pairs])
    return distance(torch.cat(found) - before, expected - before, "change of log-probs by steering")


def adapter_of(subject: Subject) -> Adapter:
    """An adapter of all linear layers, both of whose factors are random, as a heal leaves it.

    A layer that the model never calls, since it reads its weight (Jamba's `dt_proj`), learns nothing: its B stays 0.
    """
    called = set[str]()
    with live_adapter(subject.exp.lora, subject.base.model, 0) as wrapped:
        drawn, record = factors(wrapped), config_record(wrapped)
        for name, module in subject.base.model.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.add(name))
        for pair in subject.pairs:
            logits(subject.base.model, pair.prompt + pair.completion)
    rng = torch.Generator().manual_seed(1)
    drawn = {name: 0.1 * torch.randn(drawn[name].shape, generator=rng) for name in sorted(drawn)}
    for name, factor in drawn.items():
        if name.endswith(".lora_B.weight") and name.removesuffix(".lora_B.weight") not in called:
            factor.zero_()
    return Adapter(config=record, factors=drawn, curve=(), summary={}, key="random")


def _set(wrapped: Any, adapter: Adapter) -> None:
    """Write factors into a live adapter by name: PEFT's own function first renames those of converted families."""
    for name, parameter in wrapped.named_parameters():
        if ".default." in name:
            key = name.removeprefix("base_model.model.").replace(".default.", ".")
            parameter.data = adapter.factors[key].clone()


def _with_peft(subject: Subject, adapter: Adapter) -> Any:
    """Plain transformers' model with the adapter as PEFT loads it."""
    record = adapter.config | {"inference_mode": False, "target_modules": sorted(adapter.modules())}
    names = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "task_type")
    wrapped = peft.get_peft_model(subject.copied(), peft.LoraConfig(**{name: record[name] for name in names}))
    _set(wrapped, adapter)
    theirs = factors(wrapped)
    if theirs.keys() != adapter.factors.keys():
        raise Unlike(f"adapter: PEFT adapts {len(theirs)} factors, not {len(adapter.factors)}")
    return wrapped


def folding(subject: Subject) -> float:
    """Log-probabilities of a student, against PEFT's layers and against its merged weights; the base afterwards."""
    base, adapter = subject.base, adapter_of(subject)
    plain = torch.cat([logprobs(subject.plain, pair) for pair in subject.pairs])
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with Student(base).learn(adapter).view() as model:
        found = torch.cat(score(model, subject.pairs, pad_id=base.pad_id, micro_batch=3))
    after = base.model.state_dict()
    if changed := [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]:
        raise Unlike(f"folding: {changed[0]} of the base changed")
    wrapped = _with_peft(subject, adapter)
    expected = torch.cat([logprobs(wrapped, pair) for pair in subject.pairs])
    error = distance(found - plain, expected - plain, "change of log-probs against PEFT's layers")
    weights = [base.model.get_submodule(name).weight for name in adapter.modules()]
    if len({id(weight) for weight in weights}) < len(weights):  # PEFT would merge the changes of all layers into one
        return error
    merged = wrapped.merge_and_unload()
    expected = torch.cat([logprobs(merged, pair) for pair in subject.pairs])
    return max(error, distance(found - plain, expected - plain, "change of log-probs against merged weights"))


def gradients(subject: Subject, first: float = 0.0, **how: Any) -> float:
    """Gradients of nll and divergence in an adapter's factors, against autograd through PEFT's layers."""
    base, exp = subject.base, subject.exp
    lora, runtime = exp.lora.model_copy(update={"first": first}), exp.runtime.model_copy(update=how)
    targets = Targets(subject.pairs)
    reference = reference_states(Student(base), targets, runtime=runtime).states
    subject = Subject(exp.model_copy(update={"lora": lora}), base, subject.model)
    adapter = adapter_of(subject)
    with training_blocks(base.model, runtime), live_adapter(lora, base.model, 0) as live:
        _set(live, adapter)
        lowest = lora.lowest(base.model)
        frozen = freeze(base.model, targets.pairs, lowest, base.pad_id, 3) if lowest else None
        chosen = {n: p for n, p in live.named_parameters() if p.requires_grad}
        training = Training(
            exp.heal, exp.reg, base.model, list(chosen.values()), targets.pairs, reference, frozen,
            base.pad_id, runtime,
        )  # fmt: skip
        row = training.backward(range(len(targets.pairs)), measure=False)
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in chosen.items()}
    wrapped = _with_peft(subject, adapter)
    loss = torch.stack([_loss(exp, subject.plain, wrapped, pair) for pair in subject.pairs]).mean()
    loss.backward()
    if not math.isclose(row["loss"], float(loss.detach()), rel_tol=CLOSE):
        raise Unlike(f"loss: {row['loss']:.6g}, not {float(loss.detach()):.6g}")
    theirs = dict(wrapped.named_parameters())
    expected = [theirs[n].grad for n in found]
    flat = [torch.zeros_like(found[n]) if g is None else g for n, g in zip(found, expected, strict=True)]
    return distance(
        torch.cat([g.flatten() for g in found.values()]), torch.cat([g.flatten() for g in flat]), "gradients"
    )


def _loss(exp: Experiment, plain: Any, wrapped: Any, pair: Pair) -> Tensor:
    """nll + lam KL(student || base), each a mean over the completion's positions, by autograd."""
    ids, at = torch.tensor([pair.prompt + pair.completion]), slice(len(pair.prompt) - 1, -1)
    log_q = wrapped(input_ids=ids, use_cache=False).logits[0, at].float().log_softmax(-1)
    log_p = logits(plain, pair.prompt + pair.completion)[at].log_softmax(-1)
    nll: Tensor = -log_q.gather(-1, torch.tensor(pair.completion)[:, None]).mean()
    kl: Tensor = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    return nll + exp.lam * kl


def one_round(subject: Subject, folder: Path) -> float:
    """A whole round: every figure is finite, and no weight has changed. Returns how far the folded weights are off."""
    base = subject.base
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="families") as tracker:
        result = run(subject.exp, Store(folder / "store"), tracker)
    if len(result.rounds) != 1:
        raise Unlike(f"round: {result.stopped}")
    if odd := [name for name, value in result.rows[0].items() if not math.isfinite(value)]:
        raise Unlike(f"round: {odd[0]} is {result.rows[0][odd[0]]}")
    after = base.model.state_dict()
    if changed := [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]:
        raise Unlike(f"round: {changed[0]} of the base changed")
    return result.rows[0]["heal_fold_error"]


CHECKS: dict[str, Callable[[Subject], float]] = {
    "scores": scores,
    "many scores": many_scores,
    "decoding": decoding,
    "states": states,
    "steering": steering,
    "folding": folding,
    "gradients": gradients,
    "gradients, upper half": lambda subject: gradients(subject, first=0.5),
    "gradients, recomputed": lambda subject: gradients(subject, checkpoint_blocks=True),
}
