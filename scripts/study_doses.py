"""Gain and damage of each steering method at each dose: python scripts/study_doses.py [--help]

For every trait and method the base model is steered at each dose and evaluated as a round's steered model is: trait,
damage, its answers to the held-out prompts, and KL(steered || unsteered) at their positions. Nothing is trained.
Results are kept in the store, so the script can be stopped and restarted. `--draw` only plots earlier measurements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from hydra import compose, initialize_config_dir

from steer_heal.config import CONF, build
from steer_heal.eval import EvalInput, Readings, Who, evaluate
from steer_heal.experiment import Experiment
from steer_heal.generate import generate
from steer_heal.lm.student import Student, Subject
from steer_heal.model import load
from steer_heal.steer import extract
from steer_heal.store import Lazy, Store

DOCS = Path(__file__).parents[1] / "docs"
TRAITS = ("love", "formality", "care_over_authority")
METHODS = ("mean_diff", "mean_diff auto", "pca", "logistic", "cosine_gated", "ablate", "random", "prompt")
DOSES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def composed(overrides: Sequence[str]) -> Experiment:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        exp = build(compose("config", list(overrides)))
    assert isinstance(exp, Experiment)
    return exp


def figures(exp: Experiment, store: Store, dose: float) -> dict[str, float]:
    """All figures of the base model steered at a dose; 0 is unsteered."""
    student, trait, runtime = Student(load(exp.model)), exp.trait, exp.runtime
    personas = (trait.positive, trait.negative)
    vector = (
        store(extract, exp.steer, student, personas, exp.contexts.draw(exp.seed), runtime=runtime) if dose else None
    )
    subject = Subject(student, vector, dose)
    answers = store(
        generate, exp.generate, student, trait.neutral, trait.held_out, vector, [dose], exp.seed, runtime=runtime
    )  # fmt: skip
    found = {} if vector is None else {"snr": sum(vector.snr) / len(vector.snr)} if vector.layers else {}
    if vector is not None and vector.layers:
        found |= {"first_block": vector.layers[0], "last_block": vector.layers[-1]}
    who: Who = "steered" if dose else "base"
    readings = Readings.of(subject, answers, personas, partial(Lazy, store), runtime=runtime)
    given = EvalInput(who, trait, subject, answers, None, None, readings)
    for option in exp.eval.values():
        if who in option.models:
            found |= store(evaluate, option, subject, option.material(given), runtime=runtime).values
    return found


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per trait, method and dose; gains are relative to the unsteered model."""
    rows = []
    for trait in given.traits:
        base = None
        for name in given.methods:
            method, _, layers = name.partition(" ")
            chosen = [f"trait={trait}", f"steer={method}", *([f"steer.layers={layers}"] if layers else [])]
            exp = composed([*chosen, *given.overrides])
            exp.runtime.apply()
            store = Store(exp.runtime.store)
            base = base or figures(exp, store, 0.0)
            for dose in given.doses if exp.steer.has_strength else [1.0]:
                row = figures(exp, store, dose)
                gain, damage = row["trait"] - base["trait"], row["text_nll"] - base["text_nll"]
                rows.append({"on": trait, "method": name, "dose": dose, "gain": gain, "damage": damage, **row})
                print(f"{trait:20} {name:15} {dose:5.2f} trait {gain:+.2f} damage {damage:+.3f} "
                      f"kl_p95 {row['kl_p95']:6.2f} coherent {row['coherence']:4.0%}", flush=True)  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Draw one row of panels per trait: trait and damage against dose and against KL, and against each other."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("dose", "gain"), ("dose", "damage"), ("kl_p95", "gain"), ("kl_p95", "damage"), ("damage", "gain")]
    words = {
        "dose": "dose", "kl_p95": "KL(steered || unsteered), p95, nats", "gain": "trait over base, nats/token",
        "damage": "damage, nats/token",
    }  # fmt: skip
    traits, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("on", "method"))
    colours = dict(zip(methods, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(len(traits), len(panels), figsize=(20, 4 * len(traits)), squeeze=False)
    for line, trait in zip(axes, traits, strict=True):
        for axis, (x, y) in zip(line, panels, strict=True):
            for method in methods:
                some = sorted((r for r in rows if (r["on"], r["method"]) == (trait, method)), key=lambda r: r["dose"])
                style = {"marker": "*", "markersize": 13, "linestyle": ""} if len(some) == 1 else {"marker": "o"}
                axis.plot([r[x] for r in some], [r[y] for r in some], color=colours[method], label=method,
                          **{"markersize": 4, **style})  # fmt: skip
            axis.set(xlabel=words[x], ylabel=words[y])
            axis.set_xscale("log" if x == "kl_p95" else "linear")
            if x == "damage":
                axis.set_xscale("symlog", linthresh=0.1)
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_title(trait, loc="left", fontweight="bold")
    axes[0][-1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--traits", nargs="+", default=TRAITS)
    ask.add_argument("--methods", nargs="+", default=METHODS)
    ask.add_argument("--doses", nargs="+", type=float, default=DOSES)
    ask.add_argument("--out", type=Path, default=DOCS / "doses", help="figures go to OUT.jsonl, the plot to OUT.png")
    ask.add_argument("--draw", action="store_true", help="plot what OUT.jsonl holds, and measure nothing")
    ask.add_argument("overrides", nargs="*", help="configuration overrides, such as model.dtype=float32")
    given = ask.parse_args(argv)
    record = given.out.with_suffix(".jsonl")
    if not given.draw:
        record.write_text("".join(json.dumps(row) + "\n" for row in measure(given)))
    draw([json.loads(line) for line in record.read_text().splitlines()], given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
