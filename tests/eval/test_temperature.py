"""Likelihood at other temperatures, against full logits in float64; and the damage that rests on it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.toys import RUNTIME, logits_of, preset

from steer_heal.artifacts import Completions
from steer_heal.eval import EvalInput, damage, evaluate
from steer_heal.lm.base import Base
from steer_heal.lm.batch import Pair
from steer_heal.lm.student import Student, Subject
from steer_heal.lm.temperature import CHAINS, NODES, WIDEST, Scored, best_temperature, nll_at, score_tempered

PAIRS = [Pair(tuple(range(20 + i, 26 + i)), tuple(range(40 + 3 * i, 60 + 2 * i))) for i in range(5)]


@pytest.fixture(scope="module")
def sharp(tiny: Base) -> Base:
    """The tiny model with a head 8 times as steep, so that temperature matters; the base itself stays as it is."""
    import copy

    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 8
    return Base("sharp", lambda: (model, tiny.tokenizer))


def exact(base: Base, pair: Pair, temperature: float) -> tuple[float, float]:
    """Mean nll and entropy of a completion from full logits, float64."""
    logits = logits_of(base.model, *pair.prompt, *pair.completion).double()
    logp = (logits[len(pair.prompt) - 1 : -1] / temperature).log_softmax(-1)
    targets = torch.tensor(pair.completion)[:, None]
    return -float(logp.gather(-1, targets).mean()), -float((logp.exp() * logp).sum(-1).mean())


def scored(base: Base, size: int = 2) -> list[Scored]:
    return score_tempered(base.model, PAIRS, pad_id=base.pad_id, micro_batch=size, what="test")


@pytest.mark.parametrize("which", ["tiny", "sharp"])
def test_nll_entropy_and_every_temperature(which: str, request: pytest.FixtureRequest) -> None:
    """Reference: full logits; between the nodes the polynomial is read, so that its error shows."""
    base: Base = request.getfixturevalue(which)
    for pair, found in zip(PAIRS, scored(base), strict=True):
        nll, entropy = exact(base, pair, 1.0)
        assert found.nll == pytest.approx(nll, rel=1e-4)
        assert found.entropy == pytest.approx(entropy, rel=1e-3)
        for temperature in (0.3, 0.77, 1.0, 1.3, 2.2, 3.9):
            at = nll_at(found.at_nodes, temperature)
            expected, _ = exact(base, pair, temperature)
            assert at == pytest.approx(expected, rel=2e-3, abs=1e-3), f"T = {temperature}"


def test_the_best_temperature(sharp: Base) -> None:
    """Reference: the least of a fine grid of exact values; a head 8 times too steep wants a high one."""
    found = best_temperature([one.at_nodes for one in scored(sharp)])
    grid = [WIDEST ** (k / 200) for k in range(-200, 201)]
    mean = [sum(exact(sharp, pair, t)[0] for pair in PAIRS) / len(PAIRS) for t in grid]
    assert found == pytest.approx(grid[mean.index(min(mean))], rel=0.02)
    assert found > 1.5, f"T = {found:.2f}: the model is not as sure of itself as this test needs"


@pytest.mark.parametrize("best", [1 / WIDEST, 0.5, 1.0, 2.0, WIDEST])
def test_a_known_least_is_found(best: float) -> None:
    """Reference: a parabola in log T, whose least may lie at an end of the range."""
    at = math.log(best, WIDEST)
    assert best_temperature([[(x - at) ** 2 for x in NODES.tolist()]]) == pytest.approx(best, rel=1e-6)
    assert best_temperature([[(x - 1.7) ** 2 for x in NODES.tolist()]]) == pytest.approx(WIDEST)


def test_a_square_leads_to_the_next_node_of_a_chain() -> None:
    """Reference: 1 / T at a node is twice what it is at the node from which its weights come."""
    inverse = WIDEST**-NODES
    assert inverse[:-CHAINS] == pytest.approx(2 * inverse[CHAINS:])
    assert (NODES[0], NODES[-1]) == (-1, 1)


def test_damage_at_a_temperature_of_its_own(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: made-up texts whose nll is a parabola in log T, least at 2 in one half and at 1/2 in the other.

    A temperature is read where it was not fitted; both forms of a text are in one half.
    """
    exp = preset()
    option, subject = exp.eval["damage"], Subject(Student(tiny))
    given = EvalInput("base", exp.trait, subject, Completions(()), *[None] * 3)  # type: ignore[arg-type]

    def made_up(model: object, pairs: list[Pair], **_: object) -> list[Scored]:
        least = [0.5, -0.5] * (len(pairs) // 2)  # in units of log 4
        curves = [tuple(1 + (x - at) ** 2 for x in NODES.tolist()) for at in least]
        nll = [1.5] * 24 + [1.25] * 24
        return [Scored(value, 3.0, curve) for value, curve in zip(nll, curves, strict=True)]

    monkeypatch.setattr(damage, "score_tempered", made_up)
    found = evaluate(option, subject, option.material(given), runtime=RUNTIME)
    texts = list(found.items.values())
    assert [item["text_temperature"] for item in texts] == pytest.approx([0.5, 2.0] * 12)
    assert [item["text_nll_t"] for item in texts] == pytest.approx([2.0] * 24), "fitted where it is read, it would be 1"
    assert [item["text_nll"] for item in texts] == pytest.approx([1.375] * 24)
    assert [item["text_nll_raw"] for item in texts] == pytest.approx([1.5] * 24)
    for name, value in found.values.items():
        assert value == pytest.approx(sum(item[name] for item in texts) / 24), name


def test_damage_of_a_model(tiny: Base) -> None:
    """Reference: full logits of each form, at 1 and at the temperature that was fitted."""
    exp = preset()
    option, subject = exp.eval["damage"], Subject(Student(tiny))
    given = EvalInput("base", exp.trait, subject, Completions(()), *[None] * 3)  # type: ignore[arg-type]
    found = evaluate(option, subject, option.material(given), runtime=RUNTIME)
    item, sound = next(iter(found.items.values())), option.texts[0]  # type: ignore[attr-defined]
    ids = tiny.tokenizer(sound.text)["input_ids"]
    raw = Pair(tuple(ids[:1]), tuple(ids[1:]))
    turn = Pair(tiny.chat.prompt(exp.trait.neutral, sound.request), tiny.chat.text(sound.text))
    for name, pair in (("raw", raw), ("turn", turn)):
        assert item[f"text_nll_{name}"] == pytest.approx(exact(tiny, pair, 1.0)[0], rel=1e-4)
    both = [exact(tiny, pair, item["text_temperature"])[0] for pair in (raw, turn)]
    assert item["text_nll_t"] == pytest.approx(sum(both) / 2, rel=1e-3)
    assert item["text_entropy_turn"] == pytest.approx(exact(tiny, turn, 1.0)[1], rel=1e-3)
