"""The loop: steer, filter, heal, evaluate; fold the adapter in, and repeat."""

from __future__ import annotations

from steer_heal.artifacts import RoundFailed, SteeringVector
from steer_heal.eval import Who
from steer_heal.experiment import Experiment
from steer_heal.report.round_log import RoundLog
from steer_heal.result import Evaluated, Result, Round
from steer_heal.stages import Stages
from steer_heal.store import Store
from steer_heal.tracker import Tracker


def run(exp: Experiment, store: Store, tracker: Tracker) -> Result:
    """Run every round. Raises ConfigError, and RoundFailed where the first round cannot be trained.

    A later round that cannot be trained ends the run with what the earlier ones found.
    """
    stages, log, result = Stages(exp, store), RoundLog(tracker), Result()
    student, teacher, reg = stages.base, exp.steer, exp.reg
    first: SteeringVector | None = None
    target: float | None = None  # trait gain to match at
    base = stages.evaluate("base", student)

    for k in range(exp.n_rounds):
        seed = exp.seed + 1000 * (k + 1)
        with stages.round(k):
            try:
                # steer
                vector = stages.extract(student, teacher)
                first = first or vector
                log.vector(k, vector, first)
                search = stages.find_doses(student, vector, seed)
                log.dose_search(k, search)

                # filter
                completions = stages.generate(student, vector, search.doses, seed)
                log.completions(k, completions, exp.filter)
                steered = stages.evaluate("steered", student, completions, vector)
                target = stages.target(base, steered) if k == 0 else target

                # heal
                task = stages.heal_task(student, completions, steered, seed)
                reg = stages.fix_tau(reg, task)
                curve = log.curve(exp.reg, reg, exp.heal.total_steps(len(task.targets.pairs)))
                adapter, drift = stages.heal(reg, task, log=curve)
                log.healed(curve, adapter, drift)
            except RoundFailed as error:
                log.failed(k, error, exp.filter)
                if not result.rounds:
                    raise
                result.stopped = f"round {k}: {error}"
                break

            # evaluate
            student, teacher = student.learn(adapter), teacher.with_layers_from(vector)
            healed = stages.evaluate("healed", student, completions, drift=drift)
            frontier = stages.match(healed, base, target)

        models: dict[Who, Evaluated] = {"base": base, "steered": steered, "healed": healed}
        done = Round(k, models, exp.columns, vector, first, completions, reg, adapter, drift, frontier)
        result.rounds.append(done)
        log.round(done)
        if (coherence := done.row["healed/coherence"]) < exp.min_coherence:
            result.collapsed = True
            result.stopped = f"round {k}: coherence {coherence:.0%} is under {exp.min_coherence:.0%}"
            break

    log.ended(result)
    return result
