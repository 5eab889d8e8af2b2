"""A search on a model: answers, pass rate, divergence, noise, and what is stored and shown of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.compose import composed
from helpers.toys import by_hand, logits_of, preset
from helpers.tracked import read
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel

from steer_heal import generate as generating
from steer_heal import stages
from steer_heal.artifacts import Completion, SteeringVector
from steer_heal.config import ConfigError
from steer_heal.dose import DoseSearch, NoDose
from steer_heal.experiment import Experiment
from steer_heal.filter.repetition import repetition
from steer_heal.generate import generate
from steer_heal.lm.base import Base
from steer_heal.lm.kl import FAR, steering_kl
from steer_heal.lm.student import Student, Subject
from steer_heal.loop import run
from steer_heal.report.round_log import RoundLog
from steer_heal.stages import FIRST_TRIAL, Stages, Trials
from steer_heal.steer import extract
from steer_heal.store import Store
from steer_heal.tracker import Tracker

SEED = 1000
FEW = (
    "trait.generate=[Hello,What is love?,Tell me about rain,A long day at work]",
    "trait.held_out=[Who are you?]",
    "contexts.prompts=[Name a bird,Name a fish,Name a tree]",
)
PICKY = (
    "generate=nucleus",
    "filter.perplexity.max=170",
    "filter.length.min=7",
)  # about half of the answers at a dose of 1 pass


@dataclass(frozen=True)
class Bench:
    """A student with a vector of its own, and the trials of a search on them."""

    exp: Experiment
    store: Store
    student: Student
    vector: SteeringVector

    @property
    def trials(self) -> Trials:
        return Trials(self.stages, self.student, self.vector, SEED)

    @property
    def stages(self) -> Stages:
        return Stages(self.exp, self.store)

    def doses(self) -> DoseSearch:
        return self.stages.find_doses(self.student, self.vector, SEED)

    def answers(self, dose: float, samples: int) -> Sequence[Completion]:
        """The answers at a dose with the noise of trials, without a store."""
        sampling, trait = self.exp.generate.model_copy(update={"n_samples": samples}), self.exp.trait
        given = (sampling, self.student, trait.neutral, trait.generate, self.vector, [dose], SEED, FIRST_TRIAL)
        return generate(*given, runtime=self.exp.runtime).rows

    def again(self) -> Bench:
        """The same trials, with the store as another process finds it."""
        return Bench(self.exp, Store(self.store.root), self.student, self.vector)


def bench(folder: Path, student: Student, *overrides: str) -> Bench:
    exp, store = preset(*FEW, *overrides), Store(folder)
    personas = (exp.trait.positive, exp.trait.negative)
    return Bench(exp, store, student, store(extract, exp.steer, student, personas, exp.contexts, runtime=exp.runtime))


def passes_by_hand(row: Completion, model: PreTrainedModel, limit: float) -> bool:
    """The tiny preset's filters with PICKY, but for patterns, which match nothing that random weights say."""
    logits = logits_of(model, *row.prompt_ids, *row.ids)[len(row.prompt_ids) - 1 : -1]
    nll = -logits.log_softmax(-1)[torch.arange(len(row.ids)), torch.tensor(row.ids)]
    tail = nll[len(nll) - max(1, round(len(nll) / 2)) :]
    return bool(tail.mean().exp() <= limit) and repetition(row.text) <= 0.2 and len(row.ids) >= 7


@pytest.mark.parametrize(("learned", "limit"), [(False, 170), (True, 700)], ids=["base", "a later round"])
def test_survival_is_the_mean_over_prompts_of_what_passes(
    tiny: Base, second_round: Student, store_folder: Path, learned: bool, limit: int
) -> None:
    """Reference: the filters by hand, under the pristine model, on answers generated anew."""
    picky = (*PICKY, f"filter.perplexity.max={limit}")
    found = bench(store_folder, second_round if learned else Student(tiny), "dose=walk", *picky)
    shares = []
    for dose in (0.4, 1.7):
        rows = found.answers(dose, 3)
        passed = {prompt: [r for r in rows if r.prompt == prompt] for prompt in found.exp.trait.generate}
        each = [np.mean([passes_by_hand(row, tiny.model, limit) for row in part]) for part in passed.values()]
        assert found.trials.pass_rate(dose, 3) == pytest.approx(float(np.mean(each))), f"at {dose}: {each} by prompt"
        shares.append(float(np.mean(each)))
    assert 1 > shares[0] > shares[1] > 0, f"survival is {shares}, so this test would see little"


@contextmanager
def by_formula(model: PreTrainedModel, vector: SteeringVector, a: float) -> Iterator[None]:
    """Steer a model as steer/ documents it for each kind of vector."""
    change: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "add": lambda h, v, m: h + a * v,
        "gate": lambda h, v, m: h + a * ((1 - torch.cosine_similarity(h - m, v, dim=-1)) / 2)[..., None] * v,
        "ablate": lambda h, v, m: h - a * (h @ v)[..., None] * v / (v @ v),
    }
    centres = torch.zeros_like(vector.directions) if vector.centre is None else vector.centre
    hooks = []
    for layer, v, m in zip(vector.layers, vector.directions, centres, strict=True):
        block: Any = model.model.layers[layer]  # type: ignore[union-attr,index]
        hooks.append(block.register_forward_hook(lambda _m, _i, out, v=v, m=m: change[vector.operation](out, v, m)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("learned", [False, True], ids=["base", "a later round"])
@pytest.mark.parametrize("steer", ["mean_diff", "cosine_gated", "ablate"])
def test_the_divergence_is_the_95th_percentile_of_all_positions(
    tiny: Base, second_round: Student, store_folder: Path, steer: str, learned: bool
) -> None:
    """Reference: torch.distributions on whole unpadded sequences, the student steered and not; numpy's percentile."""
    found = bench(store_folder, second_round if learned else Student(tiny), "dose=iso_kl", f"steer={steer}")
    model, values = by_hand(found.student), []
    for row in found.answers(0.9, 2):
        begin = len(row.prompt_ids) - 1
        plain = Categorical(logits=logits_of(model, *row.prompt_ids, *row.ids)[begin:-1])
        with by_formula(model, found.vector, 0.9):
            steered = Categorical(logits=logits_of(model, *row.prompt_ids, *row.ids)[begin:-1])
        values += kl_divergence(steered, plain).tolist()
    expected = float(np.percentile(values, 95))
    assert expected > 2 * float(np.mean(values)) / 1.5 > 0.01, "the mean would do, so this test would see little"
    assert found.trials.divergence(0.9, 2) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("steer", ["mean_diff", "ablate"])
def test_the_dose_found_meets_the_target_and_one_a_step_higher_does_not(
    tiny: Base, store_folder: Path, steer: str
) -> None:
    """Reference: divergences measured apart from the search, in steps that four short answers can tell apart."""
    found = bench(store_folder, Student(tiny), "dose=iso_kl", f"steer={steer}", "dose.target=0.3", "dose.precision=0.2")
    (dose,) = set(found.doses().doses)
    low, high = (found.trials.divergence(one, 1) for one in (dose, 1.2 * dose))
    assert low <= 0.3 < high, f"{low} at {dose}, {high} at {1.2 * dose}"


def test_trials_share_their_noise_and_no_training_row_has_it(
    tiny: Base, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the numbers that answers were drawn by, of a search and of three batches to learn from."""
    drawn: list[Tensor] = []
    real = generating._uniforms

    def noted(*given: Any) -> Tensor:
        drawn.append(real(*given))
        return drawn[-1]

    monkeypatch.setattr(generating, "_uniforms", noted)
    found = bench(store_folder, Student(tiny), "dose=walk", *PICKY, "heal.n_keep=48", "dose.samples=2")
    doses = found.doses()
    trials, n = list(drawn), len(doses.trials)
    assert len(trials) == n > 3, f"{len(trials)} times answers for {n} trials"
    assert trials[0].shape == (8, 12), "two answers to each of four prompts"
    assert all(torch.equal(one, trials[0]) for one in trials), "doses are tried with other numbers"
    found.stages.generate(found.student, found.vector, doses.doses, SEED)
    trained = torch.cat(drawn[n:])
    assert len(trained) == 48, f"{len(trained)} rows in three batches"
    streams = {tuple(row.tolist()) for row in trained}
    assert len(streams) == 48, "training rows share numbers"
    assert not streams & {tuple(row.tolist()) for row in trials[0]}, "a trial's noise is a training row's"


@pytest.mark.parametrize("name", ["walk", "iso_kl"])
def test_a_search_is_served_from_the_store_and_goes_on_where_it_was(
    tiny: Base, store_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Reference: what the store computed; the search is interrupted at its fourth trial, and done again at its end."""
    target = {"walk": 0.7, "iso_kl": 0.3}[name]
    found = bench(store_folder, Student(tiny), f"dose={name}", f"dose.target={target}", *PICKY)
    calls: list[float] = []

    @functools.wraps(generate)
    def interrupted(*given: Any, **how: Any) -> Any:
        calls.append(given[5][0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*given, **how)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stages, "generate", interrupted)
        found.doses()
    second, third = found.again(), found.again()
    whole = second.doses()
    assert [row["alpha"] for row in whole.trials[:4]] == calls, "the search took another way"
    assert second.store.computed.count("generate.generate") == len(whole.trials) - 3 > 1, second.store.computed
    assert third.doses() == whole
    assert third.store.computed == [], "a search that was done is done again"


class Shown(Tracker):
    """A tracker that keeps the tables that W&B would show."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[key] = columns, rows


@pytest.mark.parametrize(("name", "figure"), [("walk", "survival"), ("iso_kl", "kl_p95")])
def test_a_search_is_told_as_a_table(
    tiny: Base, store_folder: Path, tmp_path: Path, told: list[str], warnings: list[str], name: str, figure: str
) -> None:
    """Reference: the trials, in metrics.jsonl, in the table for W&B, and in a line each for people."""
    found = bench(store_folder, Student(tiny), f"dose={name}", "dose.target=0.4", *PICKY).doses()
    with Shown(tmp_path / "run") as tracker:
        RoundLog(tracker).dose_search(3, found)
    logged = read(tmp_path / "run")
    assert [(row.pop("dose/round"), row.pop("dose/trial")) for row in logged] == [(3, i) for i in range(len(logged))]
    assert logged == [{f"dose/{name}": value for name, value in trial.items()} for trial in found.trials]
    assert tracker.tables == {
        "tables/doses of round 3": (["alpha", figure, "passed"], [list(trial.values()) for trial in found.trials])
    }
    lines = [line for line in told if line.startswith("  dose ")]
    verdicts = ["passes" if trial["passed"] else "does not pass" for trial in found.trials]
    assert [line.partition(", ")[2] for line in lines] == verdicts, lines
    assert set(verdicts) == {"passes", "does not pass"}, "this search only went one way"
    assert any(line.startswith("answers at ") for line in told)
    assert warnings == []


def test_where_everything_passes_the_log_says_that_the_bound_ended_it(tmp_path: Path, warnings: list[str]) -> None:
    passing = DoseSearch(
        (2.0,), ({"alpha": 1.0, "survival": 0.9, "passed": 1.0}, {"alpha": 2.0, "survival": 0.8, "passed": 1.0})
    )
    with Shown(tmp_path / "run") as tracker:
        RoundLog(tracker).dose_search(0, passing)
    assert warnings == ["every dose that was tried passes: dose.most ended the search"]


def test_a_search_in_vain_is_in_the_logs_too(tmp_path: Path) -> None:
    """Reference: the trials from 1 down to the bound; a failed search is when they matter."""
    exp = preset(*FEW, "dose=walk", "dose.target=0.9", "dose.least=0.5", *PICKY)
    with Shown(tmp_path / "run") as tracker, pytest.raises(NoDose, match=r"not even 0\.5 meets dose\.target=0\.9"):
        run(exp, Store(tmp_path / "store"), tracker)
    logged = [row["dose/alpha"] for row in read(tmp_path / "run") if "dose/trial" in row]
    assert logged == [row[0] for row in tracker.tables["tables/doses of round 0"][1]] == [1.0, 0.5]


def test_a_teacher_without_strength_is_not_searched(tiny: Base, store_folder: Path) -> None:
    """Reference: a dose of 1 for every answer, whatever the list says."""
    found = bench(store_folder, Student(tiny), "steer=prompt", "dose.alpha=[0.2,3.0]")
    assert found.doses().doses == (1.0, 1.0)


def test_what_survives_takes_filters() -> None:
    """Without filters, all answers would pass at the highest dose."""
    with pytest.raises(ConfigError, match="with a filter, since dose=walk depends on the filters"):
        composed("dose=walk", "filter=[]")


def test_a_dose_beyond_all_numbers_is_a_trial_that_fails(tiny: Base) -> None:
    """Reference: no distribution is left, and its figures can still be written as JSON."""
    vector = SteeringVector((1,), torch.full((1, 32), 1e30), (1.0,))
    student, exp = Student(tiny), preset()
    answers = generate(exp.generate, student, "Be", ["Hello"], vector, [1e10], 0, runtime=exp.runtime)
    found = steering_kl(Subject(student, vector, 1e10), answers, runtime=exp.runtime)
    assert found.values["kl_p95"] == FAR, found.values
    json.dumps(found.values, allow_nan=False)
