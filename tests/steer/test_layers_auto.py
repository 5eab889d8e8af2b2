"""Layers that choose themselves, against numpy, planted bands and a layer that only seems to tell personas apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.compose import composed
from helpers.replay import Recording
from helpers.toys import preset, runtime
from test_steer import CONTEXTS, PERSONAS
from test_steer_methods import METHODS
from torch import Tensor

from steer_heal import steer
from steer_heal.artifacts import SteeringVector
from steer_heal.config import ConfigError
from steer_heal.contexts import Contexts
from steer_heal.lm.base import Base
from steer_heal.lm.student import Student
from steer_heal.loop import run
from steer_heal.report.round_log import RoundLog
from steer_heal.result import Result
from steer_heal.steer import Method, extract, separation, snr, widest_apart
from steer_heal.tracker import Tracker
from steer_heal.tracker.jsonl import JsonlConfig

DEPTH, WIDTH, C = 10, 24, 20
AUTO = {name: method.model_copy(update={"layers": "auto"}) for name, method in METHODS.items()}
PROMPTS = ("a day at work", "hello", "what is it that people like", "the evening was long", "come back", "and tell me")


def states(shifts: dict[int, float], depth: int = DEPTH, d: int = WIDTH, c: int = C, seed: int = 0) -> tuple[Any, Any]:
    """States [c, l, d] of two personas: noise of size 1, and in some layers a distance of the means along one axis."""
    rng = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, c, depth, d, generator=rng)
    for layer, shift in shifts.items():
        axis = torch.randn(d, generator=rng)
        positive[:, layer] += shift / 2 * axis / axis.norm()
        negative[:, layer] -= shift / 2 * axis / axis.norm()
    return positive, negative


def d_prime(seen: np.ndarray, unseen: np.ndarray, direction: np.ndarray) -> float:
    """Distance of two means over the root mean square of two spreads, of projections onto a direction."""
    p, n = seen @ direction / np.linalg.norm(direction), unseen @ direction / np.linalg.norm(direction)
    spread = math.sqrt((np.var(p, ddof=1) + np.var(n, ddof=1)) / 2)
    return float((np.mean(p) - np.mean(n)) / spread)


@pytest.mark.parametrize("c", [4, 5, C])
@pytest.mark.parametrize("name", METHODS)
def test_separation(name: str, c: int) -> None:
    """Reference: numpy, layer by layer: even contexts along the direction of the odd ones, and the other way round."""
    positive, negative = states({3: 4.0, 4: 1.0}, c=c)
    found = separation(METHODS[name], positive, negative)
    assert found.shape == (DEPTH,)
    even, odd, expected = slice(0, None, 2), slice(1, None, 2), np.zeros(DEPTH)
    for seen, held in ((even, odd), (odd, even)):
        directions = METHODS[name].directions(positive[seen], negative[seen]).double().numpy()
        if name in ("mean_diff", "random"):  # a control is looked for where the mean difference is
            directions = positive[seen].double().numpy().mean(0) - negative[seen].double().numpy().mean(0)
        for layer in range(DEPTH):
            p, n = positive[held, layer].double().numpy(), negative[held, layer].double().numpy()
            expected[layer] += d_prime(p, n, directions[layer]) / 2
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


def test_separation_knows_the_sign() -> None:
    """Reference: the very figure, negated, where a method points from the first persona to the second."""
    positive, negative = states({3: 4.0})

    class Backwards(type(METHODS["mean_diff"])):  # type: ignore[misc]
        def directions(self, positive: Tensor, negative: Tensor) -> Tensor:
            return (negative - positive).mean(0)

    backwards = Backwards(name="mean_diff", layers="auto")
    assert torch.allclose(separation(backwards, positive, negative), -separation(AUTO["mean_diff"], positive, negative))


@pytest.mark.parametrize(
    ("depth", "width"), [(1, 1), (2, 1), (4, 1), (5, 1), (7, 1), (8, 2), (12, 2), (24, 5), (30, 6), (32, 6), (80, 16)]
)
def test_the_band_is_a_fifth_of_the_depth(depth: int, width: int) -> None:
    """Reference: every run of that length, its mean by numpy; as many layers as the default band has in 30."""
    for seed in range(20):
        values = torch.randn(depth, generator=torch.Generator().manual_seed(seed))
        means = np.convolve(values.double().numpy(), np.ones(width) / width, mode="valid")
        begin = int(means.argmax())
        assert widest_apart(values) == list(range(begin, begin + width))
    assert len(METHODS["mean_diff"].model_copy(update={"layers": (0.4, 0.6)}).blocks(30)) == len(
        widest_apart(torch.zeros(30))
    )


def test_one_high_layer_does_not_outweigh_a_band() -> None:
    """Reference: the mean of a run counts, not its largest member."""
    values = torch.zeros(10)
    values[1], values[6:8] = 5.0, 4.0
    assert widest_apart(values) == [6, 7]


def on_states(monkeypatch: pytest.MonkeyPatch, method: Method, positive: Tensor, negative: Tensor) -> SteeringVector:
    """The vector of a method for a student that has these states."""
    monkeypatch.setattr(
        steer, "persona_states", lambda _s, _p, _c, layers, _r: (positive[:, list(layers)], negative[:, list(layers)])
    )
    student: Any = SimpleNamespace(base=SimpleNamespace(blocks=range(positive.shape[1])))
    return extract(method, student, PERSONAS, CONTEXTS, runtime=runtime())


@pytest.mark.parametrize("begin", [0, 3, 8])
@pytest.mark.parametrize("name", ["mean_diff", "pca", "logistic", "cosine_gated", "ablate"])
def test_the_planted_band_is_found(monkeypatch: pytest.MonkeyPatch, name: str, begin: int) -> None:
    """Reference: where it was planted; and the vector is the one that those layers give when they are named."""
    positive, negative = states({begin: 6.0, begin + 1: 6.0, (begin + 4) % DEPTH: 6.0})
    found = on_states(monkeypatch, AUTO[name], positive, negative)
    assert found.layers == (begin, begin + 1)
    named = METHODS[name].model_copy(update={"layers": (begin, begin + 1)})
    expected = on_states(monkeypatch, named, positive, negative)
    assert torch.equal(found.directions, expected.directions)
    assert found.snr == expected.snr
    assert (found.centre is None) == (name != "cosine_gated")
    if found.centre is not None and expected.centre is not None:
        assert torch.equal(found.centre, expected.centre)


def test_a_layer_that_only_overfits_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few contexts in many dimensions: along its own mean difference noise is far apart, and not in other contexts."""
    positive, negative = states({7: 0.0}, d=512, c=12)
    quiet = torch.Generator().manual_seed(1)
    positive[:, 7], negative[:, 7] = 0.05 * torch.randn(2, 12, 512, generator=quiet)
    positive[:, 7, 0] += 1 + torch.randn(12, generator=quiet)
    negative[:, 7, 0] -= 1 + torch.randn(12, generator=quiet)
    seen = [
        d_prime(positive[:, k].numpy(), negative[:, k].numpy(), (positive - negative)[:, k].mean(0).numpy())
        for k in range(DEPTH)
    ]
    assert seen[7] == min(seen), "this test needs noise that seems to be farther apart"
    held_out = separation(AUTO["mean_diff"], positive, negative)
    assert int(held_out.argmax()) == 7
    assert 7 in on_states(monkeypatch, AUTO["mean_diff"], positive, negative).layers


@pytest.mark.parametrize("name", AUTO)
def test_on_a_model(tiny: Base, name: str) -> None:
    """Reference: the layer named outright; four blocks leave room for one."""
    contexts = Contexts(name="test", prompts=PROMPTS)
    found = extract(AUTO[name], Student(tiny), PERSONAS, contexts, runtime=runtime())
    assert len(found.layers) == 1
    named = METHODS[name].model_copy(update={"layers": found.layers})
    expected = extract(named, Student(tiny), PERSONAS, contexts, runtime=runtime())
    torch.testing.assert_close(found.directions, expected.directions, atol=1e-5, rtol=1e-4)
    settled = AUTO[name].with_layers_from(found)
    assert settled.fingerprint == named.fingerprint, "a later round has another teacher"
    assert named.with_layers_from(found) == named
    assert not AUTO[name].needs_model, "every model has layers to choose from"


def test_snr_is_numpys() -> None:
    """Reference: mean over spread of the differences along a direction; mean_diff's own is norm over spread."""
    positive, negative = states({2: 3.0}, depth=4)
    differences = (positive - negative).double().numpy()
    directions = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    mean = (positive - negative).mean(0)
    for some in (directions, mean, -mean, 7 * directions):
        for layer, value in enumerate(snr(some, positive - negative)):
            unit = some[layer].double().numpy() / np.linalg.norm(some[layer].double().numpy())
            along = differences[:, layer] @ unit
            assert value == pytest.approx(along.mean() / along.std(ddof=1), rel=1e-3, abs=1e-5)
    along = torch.einsum("cld,ld->cl", positive - negative, mean / mean.norm(dim=-1, keepdim=True))
    expected = (mean.norm(dim=-1) / along.std(0)).tolist()
    assert snr(mean, positive - negative) == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in expected)
    assert snr(-mean, positive - negative) == pytest.approx([-value for value in expected], rel=1e-5)


@pytest.mark.parametrize("prompts", ["[a,b,c]", "[a,b,a,b]"])
def test_halves_need_two_contexts_each(prompts: str) -> None:
    """One has no spread: without this the first band would be taken, whatever the states."""
    with pytest.raises(ConfigError, match=r"at least 4 contexts\.prompts for steer\.layers=auto, not [23]$"):
        composed("experiment=tiny", "steer.layers=auto", f"contexts.prompts={prompts}")
    composed("experiment=tiny", "steer.layers=auto", "contexts.prompts=[a,b,c,d]")
    composed("experiment=tiny", f"contexts.prompts={prompts}")
    positive, negative = states({3: 4.0}, c=4)
    assert separation(AUTO["mean_diff"], positive, negative).isfinite().all()


def test_contexts_that_are_one_are_refused() -> None:
    refused = r"^contexts\.prompts=\['a', 'a'\] is not allowed: must be at least two different prompts"
    with pytest.raises(ConfigError, match=refused):
        composed("experiment=tiny", "contexts.prompts=[a,a]")


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Recording, list[dict[str, Any]], int]:
    """A complete run: result, artifacts of its stages, rows of metrics.jsonl, and how often layers were chosen."""
    folder, calls = tmp_path_factory.mktemp("run"), []
    exp = preset("steer=pca", "steer.layers=auto", "n_rounds=2", "dose.alpha=[0.5,1.0]",
                 "heal.epochs=1", "heal.n_keep=16", "generate.max_new_tokens=4")  # fmt: skip

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return separation(*given)

    store = Recording(folder / "store", exp)
    with (
        pytest.MonkeyPatch.context() as patch,
        JsonlConfig(name="jsonl").open(folder, config={}, group=None, run_name="auto") as tracker,
    ):
        patch.setattr(steer, "separation", counted)
        result = run(exp, store, tracker)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, store, rows, len(calls)


def test_layers_are_chosen_once(two_rounds: Any) -> None:
    """Reference: round 0's layers; the second round's directions are those of another student at them."""
    _, store, _, calls = two_rounds
    first, second = store.made["extract 0"], store.made["extract 1"]
    assert calls == 1, f"layers were chosen {calls} times"
    assert first.layers == second.layers
    assert len(first.layers) == 1
    assert not torch.equal(first.directions, second.directions)


def test_what_is_logged_of_a_vector(two_rounds: Any) -> None:
    """Reference: the artifacts: a row a round and layer, and their means beside the round's other figures."""
    result, store, rows, _ = two_rounds
    logged = [{k: v for k, v in row.items() if k != "time"} for row in rows if "vector/round" in row]
    first, expected = store.made["extract 0"], []
    for k, row in enumerate(result.rows):
        vector = store.made[f"extract {k}"]
        one, other = vector.directions.double().numpy(), first.directions.double().numpy()
        cos = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        norms = np.linalg.norm(one, axis=1)
        for i, layer in enumerate(vector.layers):
            figures = {"norm": norms[i], "snr": vector.snr[i], "cos_v0": cos[i]}
            expected.append({"vector/round": k, "vector/layer": layer} | {f"vector/{n}": v for n, v in figures.items()})
        assert row["vector_norm"] == pytest.approx(norms.mean(), rel=1e-5)
        assert row["vector_snr"] == pytest.approx(np.mean(vector.snr), rel=1e-5)
        assert row["cos_v0"] == pytest.approx(cos.mean(), abs=1e-5)
    assert len(logged) == len(expected) == 2
    for one, other in zip(logged, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4), f"{one} is not {other}"
    in_rounds = [row["round/cos_v0"] for row in rows if "round/cos_v0" in row]
    assert in_rounds == [row["cos_v0"] for row in result.rows]


@pytest.mark.parametrize(("layers", "said"), [((1, 2, 3), "1 to 3"), ((3, 0), "3, 0"), ((2, 1), "2, 1"), ((2,), "2")])
def test_what_is_told_of_a_vector(tmp_path: Path, told: list[str], layers: tuple[int, ...], said: str) -> None:
    """Reference: made-up directions of known length, at a known angle to round 0's."""
    first = torch.zeros(len(layers), 4)
    first[:, 0] = 1.0
    now = torch.tensor([[3.0, 4.0, 0.0, 0.0]]).repeat(len(layers), 1) * torch.arange(1.0, len(layers) + 1)[:, None]
    vectors = [SteeringVector(layers, some, tuple(0.5 * k for k in range(len(layers)))) for some in (first, now)]
    with Tracker(tmp_path) as tracker:
        RoundLog(tracker).vector(4, vectors[1], vectors[0])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["vector/layer"] for row in rows] == list(layers)
    assert [row["vector/norm"] for row in rows] == pytest.approx([5.0 * k for k in range(1, len(layers) + 1)])
    assert [row["vector/cos_v0"] for row in rows] == pytest.approx([0.6] * len(layers))
    assert {row["vector/round"] for row in rows} == {4}
    n = len(layers)
    norms, ratios = ("5", "0") if n == 1 else (f"5 to {5 * n}", f"0 to {0.5 * (n - 1):g}")
    assert told == [f"vector at blocks {said}: norm {norms}, signal to noise {ratios}, cosine to round 0 0.6"]
