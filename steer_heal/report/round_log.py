"""What a round tells before it trains: what it steers with, and how its doses were found."""

from __future__ import annotations

from loguru import logger

from steer_heal.artifacts import SteeringVector
from steer_heal.dose import Found
from steer_heal.tracker.wandb import Tracker


def tell_vector(k: int, vector: SteeringVector, first: SteeringVector, tracker: Tracker) -> None:
    """Norm, signal-to-noise ratio and cosine to round 0's, block by block; nothing of a teacher without a vector."""
    if not vector.layers:
        return
    figures = {"norm": vector.norms(), "snr": vector.snr, "cos_v0": vector.cosines(first)}
    columns, rows = ["layer", *figures], list(zip(vector.layers, *figures.values(), strict=True))
    for row in rows:
        tracker.log({"vector/round": k} | {f"vector/{name}": value for name, value in zip(columns, row, strict=True)})
    tracker.table(f"tables/vector of round {k}", columns, rows)
    first_block, last_block = vector.layers[0], vector.layers[-1]
    in_a_row = vector.layers == tuple(range(first_block, last_block + 1))
    blocks = _span(first_block, last_block) if in_a_row else ", ".join(map(str, vector.layers))
    spans = [_span(min(values), max(values)) for values in figures.values()]
    logger.info("vector at blocks {}: norm {}, signal to noise {}, cosine to round 0 {}", blocks, *spans)


def _span(low: float, high: float) -> str:
    ends = dict.fromkeys([f"{low:.3g}", f"{high:.3g}"])  # both, or one where they are the same
    return " to ".join(ends)


def tell_search(k: int, found: Found, tracker: Tracker) -> None:
    """What was tried to find the doses, in its order."""
    for i, trial in enumerate(found.trials):
        tracker.log({"dose/round": k, "dose/trial": i} | {f"dose/{name}": value for name, value in trial.items()})
        (figure,) = trial.keys() - {"alpha", "passed"}
        verdict = "passes" if trial["passed"] else "does not pass"
        logger.info("  dose {:.3g}: {} {:.3g}, {}", trial["alpha"], figure, trial[figure], verdict)
    if found.trials:
        if all(trial["passed"] for trial in found.trials):
            logger.warning("every dose that was tried passes: dose.most ended the search")
        if found.doses:
            logger.info("answers at {}", ", ".join(f"{dose:.3g}" for dose in dict.fromkeys(found.doses)))
        columns = list(found.trials[0])
        tracker.table(
            f"tables/doses of round {k}", columns, [[trial[name] for name in columns] for trial in found.trials]
        )
