"""Methods that find directions, against other computations of them, on random states."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toys import runtime
from test_steer import CONTEXTS, PERSONAS
from torch import Tensor

from steer_heal.artifacts import SteeringVector
from steer_heal.lm.base import Base
from steer_heal.lm.hooks import Operation, steered
from steer_heal.lm.student import Student
from steer_heal.steer import Method, extract
from steer_heal.steer.ablate import Ablate
from steer_heal.steer.cosine_gated import CosineGated, Gate
from steer_heal.steer.logistic import Logistic
from steer_heal.steer.mean_diff import MeanDiff
from steer_heal.steer.pca import Pca
from steer_heal.steer.random import Random

C, L, D = 24, 3, 7
METHODS: dict[str, Method] = {
    "mean_diff": MeanDiff(name="mean_diff", layers=(1, 2)),
    "pca": Pca(name="pca", layers=(1, 2)),
    "logistic": Logistic(name="logistic", layers=(1, 2), l2=0.01),
    "random": Random(name="random", layers=(1, 2), draw=3),
    "cosine_gated": CosineGated(name="cosine_gated", layers=(1, 2)),
    "ablate": Ablate(name="ablate", layers=(1, 2)),
}


def drawn() -> tuple[Tensor, Tensor]:
    """States [c, l, d] of two personas that differ along the first axis, among much that varies."""
    rng = torch.Generator().manual_seed(4)
    topic, shift = torch.randn(C, L, D, generator=rng), torch.zeros(D)
    shift[0] = 1.5
    noise = torch.randn(2, C, L, D, generator=rng) * torch.linspace(0.2, 1.4, D)
    return 5 + topic + shift + noise[0], 5 + topic - shift + noise[1]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1))


def test_pca_is_numpys_first_right_singular_vector() -> None:
    """Reference: eigenvectors of the differences' second moment by numpy, of the sign of the mean."""
    positive, negative = drawn()
    found = METHODS["pca"].directions(positive, negative)
    for layer in range(L):
        d = (positive - negative)[:, layer].double().numpy()
        vector = np.linalg.eigh(d.T @ d)[1][:, -1]
        vector *= np.sign(vector @ d.mean(0))
        assert cosine(found[layer], torch.tensor(vector)) == pytest.approx(1, abs=1e-9), f"layer {layer}"


def test_logistic_is_where_the_gradient_is_zero() -> None:
    """Reference: Newton's method in float64 on the same penalised likelihood, by numpy."""
    positive, negative = drawn()
    found = METHODS["logistic"].directions(positive, negative)
    y = np.repeat([1.0, -1.0], C)
    for layer in range(L):
        z = torch.cat([positive[:, layer], negative[:, layer]]).double().numpy()
        z = z - z.mean(0)
        z = np.c_[z / np.sqrt((z**2).sum(1).mean()), np.ones(2 * C)]
        penalty, w = np.diag([0.01] * D + [0.0]), np.zeros(D + 1)
        for _ in range(100):
            p = 1 / (1 + np.exp(y * (z @ w)))
            gradient = -(z * (y * p)[:, None]).mean(0) + penalty @ w
            w -= np.linalg.solve(z.T @ (z * (p * (1 - p))[:, None]) / (2 * C) + penalty, gradient)
        assert np.abs(gradient).max() < 1e-12, "the reference has not arrived"
        torch.testing.assert_close(found[layer].double(), torch.tensor(w[:D]), rtol=1e-5, atol=1e-6)


def test_a_probe_turns_away_from_what_varies() -> None:
    """Reference: of two axes with the same difference of means, it trusts that which varies less within a persona."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 400, 1, 2, generator=rng) * torch.tensor([0.3, 3.0])
    w = METHODS["logistic"].directions(1 + noise[0], -1 + noise[1])[0]
    assert w[0] > 5 * abs(w[1]), f"weights {w.tolist()}"


def test_random_directions_are_drawn_by_number() -> None:
    """Reference: the same number gives the same direction, another another; personas have no part in it."""
    states = drawn()
    first = METHODS["random"].directions(*states)
    assert torch.equal(first, METHODS["random"].directions(states[1], states[0]))
    other = Random(name="random", layers=(1, 2), draw=4).directions(*states)
    assert all(abs(cosine(a, b)) < 0.99 for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_vector_has_the_mean_differences_norm(tiny: Base, name: str) -> None:
    """Reference: the mean difference's own, layer by layer; those that know the personas point its way."""
    plain, found = (
        extract(METHODS[which], Student(tiny), PERSONAS, CONTEXTS, runtime=runtime()) for which in ("mean_diff", name)
    )
    for one, two in zip(found.norms(), plain.norms(), strict=True):
        assert math.isclose(one, two, rel_tol=1e-5), f"norm {one}, mean_diff's is {two}"
    assert name == "random" or found.cosine(plain) > 0.3, f"cosine {found.cosine(plain)} to mean_diff"


def changed_by(base: Base, vector: SteeringVector, dose: float | Tensor) -> tuple[Tensor, Tensor]:
    """The states [b, s, d] that enter the vector's first block's hook, and those that leave it."""
    seen: list[Tensor] = []
    block = base.blocks[vector.layers[0]]
    note = lambda _m, _i, out: seen.append(out.clone())  # noqa: E731
    ids = torch.arange(10, 22).reshape(3, 4)
    before = block.register_forward_hook(note)
    with steered(base, replace(vector, layers=vector.layers[:1], directions=vector.directions[:1]), dose):
        after = block.register_forward_hook(note)
        base.model(input_ids=ids, use_cache=False)
    before.remove()
    after.remove()
    return seen[0], seen[1]


DOSES = torch.tensor([0.0, 0.5, 2.0])


def test_a_gate_gives_what_a_state_lacks(tiny: Base) -> None:
    """Reference: the formula, state by state, with torch's own cosine; each row at a dose of its own."""
    vector = extract(METHODS["cosine_gated"], Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
    assert vector.centre is not None
    h, found = changed_by(tiny, vector, DOSES)
    v, m = vector.directions[0], vector.centre[0]
    for row, dose in enumerate(DOSES.tolist()):
        for t in range(h.shape[1]):
            expected = h[row, t] + dose * (1 - cosine(h[row, t] - m, v)) / 2 * v
            torch.testing.assert_close(found[row, t], expected, atol=1e-5, rtol=0, msg=lambda e: f"row {row}: {e}")
    full, none = m - 3 * v, m + 3 * v
    gate = Gate(torch.ones(1, 1, 1), v, m, torch.float32)
    assert torch.allclose(gate(full[None, None])[0, 0], full + v, atol=1e-4)
    assert torch.allclose(gate(none[None, None])[0, 0], none, atol=1e-4)


def test_ablation_takes_away_the_direction(tiny: Base) -> None:
    """Reference: at a dose of 1 nothing is left along it and all else is; in between, its share; row by row."""
    vector = extract(METHODS["ablate"], Student(tiny), PERSONAS, CONTEXTS, runtime=runtime())
    h, found = changed_by(tiny, vector, DOSES)
    unit = vector.directions[0] / vector.directions[0].norm()
    torch.testing.assert_close(found @ unit, (h @ unit) * (1 - DOSES)[:, None], atol=1e-5, rtol=0)
    across = torch.eye(len(unit)) - torch.outer(unit, unit)
    torch.testing.assert_close(found @ across, h @ across, atol=1e-5, rtol=0)
    assert torch.equal(found[0], h[0]), "a dose of 0 changes something"


@pytest.mark.parametrize("name", ["add", "gate", "ablate"])
def test_a_vector_comes_back_from_its_folder(tmp_path: Path, name: str) -> None:
    """Reference: itself."""
    centre = torch.randn(2, 5) if name == "gate" else None
    vector = SteeringVector((3, 1), torch.randn(2, 5), (0.5, 2.0), name, centre)
    vector.save(tmp_path)
    back = SteeringVector.load(tmp_path)
    assert (back.layers, back.snr, back.operation) == (vector.layers, vector.snr, vector.operation)
    assert torch.equal(back.directions, vector.directions)
    assert (back.centre is None) == (centre is None)
    if centre is not None and back.centre is not None:
        assert torch.equal(back.centre, centre)


def test_an_operation_that_nobody_imported_is_named(tiny: Base) -> None:
    vector = SteeringVector((1,), torch.ones(1, 32), (1.0,), "nudge")
    refused = pytest.raises(ValueError, match="no operation 'nudge': the file of its steer option is not imported")
    with refused, steered(tiny, vector, 1.0):
        pass


def test_two_operations_of_one_name_are_refused() -> None:
    """Reference: a vector from the store could not be attributed to either of them."""
    with pytest.raises(ValueError, match=r"steer_heal\.lm\.hooks has an operation called 'add' already"):
        type("Other", (Operation,), {"__module__": __name__}, name="add")
    assert Operation.known["add"].__module__ == "steer_heal.lm.hooks"


def test_an_operation_imported_under_two_names_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a test of somebody's own package, and then as an option."""
    source = "from steer_heal.lm.hooks import Operation\n\n\nclass Nudge(Operation, name='nudge_twice'):\n    pass\n"
    (tmp_path / "one_file.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    first = importlib.import_module("one_file")
    spec = importlib.util.spec_from_file_location("another_name", tmp_path / "one_file.py")
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "another_name", again)
    spec.loader.exec_module(again)
    assert Operation.known.pop("nudge_twice") is again.Nudge is not first.Nudge


def test_the_source_of_a_users_operation_is_in_the_key(tmp_path: Path) -> None:
    """Reference: the same option with an operation that did not come with steer_heal."""
    foreign = type("Foreign", (Operation,), {"__module__": __name__}, name="foreign_for_a_test")
    Operation.known.pop("foreign_for_a_test")
    plain = MeanDiff(name="mean_diff", layers=(1,))
    other = type("Other", (MeanDiff,), {"__module__": MeanDiff.__module__, "operation": foreign}, key=MeanDiff.key_name)
    assert [MeanDiff.key_name, *plain.fingerprint[1:]] == plain.fingerprint
    assert len(other(name="mean_diff", layers=(1,)).fingerprint) > len(plain.fingerprint)
