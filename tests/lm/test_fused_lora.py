"""A linear layer and its LoRA in one step against PEFT's own forward: values, and gradients in x, A and B."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import peft
import pytest
import torch
from helpers.families import alike, built, family
from helpers.toys import lora
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steer_heal.lm.batch import states
from steer_heal.lm.fused_lora import _LoraLinear, fuse
from steer_heal.lora import live_adapter

IN, OUT, R, ALPHA = 10, 14, 3, 5.0
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(IN, OUT, bias=False),
    "biased": lambda: nn.Linear(IN, OUT),
    "turned": lambda: Conv1D(OUT, IN),
}
EXACT = {torch.float32: 2e-6, torch.float64: 1e-13}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wrapped(layer: nn.Module, fused: bool) -> Any:
    """A copy of the layer, wrapped by PEFT, with random factors, B too; with the fused forward or without."""
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["layer"], lora_dropout=0.0, fan_in_fan_out=isinstance(layer, Conv1D)
    )  # type: ignore[arg-type]
    model = peft.get_peft_model(Holder(copy.deepcopy(layer).requires_grad_(False)), config)  # type: ignore[arg-type]
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data = random(*p.shape, seed=20 + i, dtype=p.dtype)
    if fused:
        fuse(model)  # type: ignore[arg-type]
    return model


def made(name: str, dtype: torch.dtype) -> nn.Module:
    layer = LAYERS[name]()
    for i, p in enumerate(layer.parameters()):
        p.data = random(*p.shape, seed=10 + i)
    return layer.to(dtype)


def is_fused(model: Any) -> bool:
    return "forward" in vars(model.base_model.model.layer)


def figures(model: Any, x: Tensor, over: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of `over` times it, by name."""
    x = x.detach().requires_grad_(x.requires_grad)  # keeps its strides
    trainable = {n.split(".")[-3]: p for n, p in model.named_parameters() if p.requires_grad}
    out = model(x)
    wanted = list(trainable.values()) + ([x] if x.requires_grad else [])
    slopes = torch.autograd.grad(out, wanted, over)
    return {"output": out.detach()} | dict(zip([*trainable, "x"], slopes, strict=False))


INPUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "batch": lambda dtype: random(2, 5, IN, seed=1, dtype=dtype),
    "one token": lambda dtype: random(1, 1, IN, seed=1, dtype=dtype),
    "no batch": lambda dtype: random(5, IN, seed=1, dtype=dtype),
    "four dimensions": lambda dtype: random(2, 3, 2, IN, seed=1, dtype=dtype),
    "no token": lambda dtype: random(0, IN, seed=1, dtype=dtype),
    "transposed": lambda dtype: random(IN, 5, 2, seed=1, dtype=dtype).permute(2, 1, 0),
    "a slice": lambda dtype: random(2, 9, 2 * IN, seed=1, dtype=dtype)[:, ::2, ::2],
    "expanded": lambda dtype: random(1, 5, IN, seed=1, dtype=dtype).expand(3, 5, IN),
}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, what: str, needed: bool, dtype: torch.dtype) -> None:
    """Reference: PEFT and autograd, in the same precision; gradients that come in are contiguous or not."""
    layer, x = made(name, dtype), INPUTS[what](dtype).requires_grad_(needed)
    ours, theirs = wrapped(layer, True), wrapped(layer, False)
    assert is_fused(ours), "this test needs the fused forward"
    assert not is_fused(theirs), "this test needs PEFT's forward"
    shape = (*x.shape[:-1], OUT)
    for over in (random(*shape, seed=2, dtype=dtype), random(*shape[::-1], seed=3, dtype=dtype).mT.reshape(shape),
                 random(*shape[::-1], seed=4, dtype=dtype).permute(*range(len(shape))[::-1]),
                 torch.ones((), dtype=dtype).expand(shape)):  # fmt: skip
        found = figures(ours, x, over)
        expected = figures(theirs, x.contiguous(), over)  # Conv1D itself takes no other
        assert found.keys() == expected.keys() == {"output", "lora_A", "lora_B"} | ({"x"} if needed else set())
        for part, value in expected.items():
            assert found[part].dtype == value.dtype, f"{name}, {what}: {part} is {found[part].dtype}"
            size = float(value.abs().max()) if value.numel() else 1.0
            torch.testing.assert_close(
                found[part], value, atol=EXACT[dtype] * size, rtol=0, msg=lambda m: f"{name}, {what}, {part}: {m}"
            )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_gradients_by_finite_differences(bias: bool, turned: bool) -> None:
    """Reference: torch.autograd.gradcheck in float64."""
    double = torch.float64
    weight = random(IN + R, OUT, seed=5, dtype=double).T if turned else random(OUT, IN + R, seed=5, dtype=double)
    offset = random(OUT, seed=6, dtype=double) if bias else None
    x, a, b = (random(*shape, seed=7, dtype=double).requires_grad_() for shape in ((6, IN), (R, IN), (OUT, R)))
    plain = lambda x, a, b: _LoraLinear.apply(x, weight, offset, a, b, 1.7)  # type: ignore[no-untyped-call]  # noqa: E731
    assert torch.autograd.gradcheck(plain, (x, a, b), atol=1e-7, rtol=1e-6), "a gradient is wrong"


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name: str) -> None:
    """Reference: PEFT in float64 on the same bfloat16 weights and inputs; PEFT's own error is the yardstick.

    PEFT multiplies factors in float32, so that their gradients have next to no error there; ours are within rounding.
    """
    layer, narrow = made(name, torch.bfloat16), torch.bfloat16
    x, over = random(4, 50, IN, seed=1, dtype=narrow).requires_grad_(), random(4, 50, OUT, seed=2, dtype=narrow)
    ours, theirs = figures(wrapped(layer, True), x, over), figures(wrapped(layer, False), x, over)
    exact = wrapped(copy.deepcopy(layer).double(), False)
    truth = figures(exact, x.detach().double().requires_grad_(), over.double())
    for part in ("output", "x"):
        off, yardstick = error(ours[part], truth[part]), error(theirs[part], truth[part])
        assert off < 2 * yardstick, f"{name}: relative error {off:.2e} of {part}, PEFT has {yardstick:.2e}"
    for part in ("lora_A", "lora_B"):
        assert ours[part].dtype == torch.float32, f"{name}: the gradient of {part} is {ours[part].dtype}"
        off = error(ours[part], truth[part])
        assert off < 2**-8, f"{name}: relative error {off:.2e} of {part}'s gradient is more than rounding"


def adapter_gradient(model: PreTrainedModel, fused: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    if not fused:
        monkeypatch.setattr("steer_heal.lora.fuse", lambda _: {})
    with live_adapter(lora(2), model, 3) as live:
        parameters = [p for p in live.parameters() if p.requires_grad]
        for i, p in enumerate(parameters):
            p.data = 0.1 * random(*p.shape, seed=i)
        hidden = states(model, alike(9)).float()
        slopes = torch.autograd.grad((random(*hidden.shape, seed=99) * hidden).sum(), parameters)
    monkeypatch.undo()
    return torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("kind", ["LlamaConfig", "PhiConfig"])
def test_a_bfloat16_models_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same model in float32 under PEFT; PEFT's error in bfloat16 is the yardstick."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    model = built(kind, **size, vocab_size=60).to(torch.bfloat16)  # type: ignore[arg-type]
    wide = copy.deepcopy(model).float()
    truth = adapter_gradient(wide, False, monkeypatch)
    off, yardstick = (error(adapter_gradient(model, fused, monkeypatch), truth) for fused in (True, False))
    assert off < 2 * yardstick, f"{kind}: relative error {off:.2e}, PEFT has {yardstick:.2e}"


class Sub(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(after: bool) -> nn.Module:
    layer = made("biased", torch.float32)
    if after:
        layer.register_forward_hook(lambda module, inputs, output: output + 1)
    else:
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return layer


@pytest.mark.parametrize("layer", [
    pytest.param(lambda: hooked(True), id="hook"), pytest.param(lambda: hooked(False), id="hook before"),
    pytest.param(lambda: Sub(IN, OUT), id="subclass"),
])  # fmt: skip
def test_what_is_left_to_peft(layer: Callable[[], nn.Module]) -> None:
    """Reference: PEFT, to the bit; the fused forward would see the weights alone."""
    base, x = layer(), INPUTS["batch"](torch.float32)
    ours, theirs = wrapped(base, True), wrapped(base, False)
    assert not is_fused(ours), "a layer that does more than its weights say has the fused forward"
    assert torch.equal(ours(x), theirs(x)), "not PEFT's output"


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_the_model_has_its_own_modules_again(name: str) -> None:
    """Reference: the modules and the states before, to the bit; inside, every adapted layer is fused."""
    model, batch = family(name), alike(9)
    before, plain = dict(model.named_modules()), states(model, batch)
    with live_adapter(lora(2), model, 3) as live:
        layers = [m for m in live.modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert len(layers) > 3, "this test needs adapted layers"
        assert all("forward" in vars(layer) for layer in layers), f"{name}: some layers have PEFT's forward"
        for p in live.parameters():
            if p.requires_grad:
                p.data.fill_(0.1)
        assert not torch.allclose(states(model, batch), plain, atol=1e-3), "the adapter changes nothing"
    after = dict(model.named_modules())
    assert after.keys() == before.keys(), f"other modules: {sorted(after.keys() ^ before.keys())[:4]}"
    assert all(after[key] is before[key] for key in before), "modules were replaced"
    assert not any("forward" in vars(module) for module in after.values()), "a module kept the fused forward"
    assert torch.equal(states(model, batch), plain), "other states than before"
