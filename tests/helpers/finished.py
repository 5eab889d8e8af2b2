"""Folders of finished runs, made up: what a comparison reads, with figures of one's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from steer_heal.artifacts import Row, write_jsonl
from steer_heal.report.run_folder import ITEMS, KNOWN

PROBES, TEXTS, TARGET = 12, 10, 0.3
DAMAGES = ("text_nll", "text_nll_t", "text_nll_raw", "text_nll_turn")


def finished(
    folder: Path, reg: str, seed: int, damage: float, *, tempered: float | None = None, raw: float | None = None,
    gain: float = 0.6, target: float | None = TARGET, overrides: Sequence[str] = (),
    basis: dict[str, str] | None = None, noise: float = 0.002, group: str = "",
    rest: Sequence[str] = (), teacher: str = "mean_diff", steered: float = 1.2,
) -> Path:  # fmt: skip
    """A run whose damage at T* is `damage` for every text, more or less, and twice that at gate 1.

    `tempered` and `raw` are the damage by `damage_t` and on raw text alone, if they differ; a `gain` under the target
    does not reach it; `target` None was not matched. `rest` are the settings beside regulariser and seed.
    """
    rng = np.random.default_rng([seed, *reg.encode()])
    own = {"text_nll": damage, "text_nll_t": damage if tempered is None else tempered,
           "text_nll_raw": damage if raw is None else raw, "text_nll_turn": damage}  # fmt: skip
    spread = rng.normal(0, noise, TEXTS)
    probes = rng.normal(0, 0.01, PROBES)
    reached = target is not None and gain >= target
    gate = (target or 0) / gain

    def at(c: float) -> tuple[dict[str, Row], dict[str, Row]]:
        """Items of trait and damage at a gate; damage rises as its square, and is `damage` at T*."""
        trait = {f"p{i}": {"trait": 0.5 + c * gain + c * float(p - probes.mean())} for i, p in enumerate(probes)}
        for row in trait.values():
            row |= {"trait_for": row["trait"] / 2, "trait_against": -row["trait"] / 2}
        scale = (c * gain / TARGET) ** 2
        texts = {f"t{j}": {n: 3 + scale * (own[n] + float(s)) for n in DAMAGES} for j, s in enumerate(spread)}
        return trait, texts

    def means(c: float) -> Row:
        return {
            n: float(np.mean([row[n] for row in found.values()])) for found in at(c) for n in next(iter(found.values()))
        }

    def put(who: str, c: float) -> None:
        for name, found in zip(("trait", "damage"), at(c), strict=True):
            place = folder / ITEMS / who / f"{name}.jsonl"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(place, ({"id": i} | row for i, row in found.items()))

    put("base", 0)
    put("round-0-healed", 1)
    row: Row = {f"{who}/{name}": 0.5 for who in ("base", "steered", "healed") for name in ("coherence",)}
    for who, c in (("base", 0.0), ("healed", 1.0)):
        row |= {f"{who}/{name}": value for name, value in means(c).items()}
    moved = steered * 0.6  # the same for all regularisers
    row |= {
        "steered/trait": 0.5 + moved,
        "steered/trait_for": 0.25 + moved / 2,
        "steered/trait_against": -0.25 - moved / 2,
    }
    row |= {f"steered/{name}": 3 + 0.1 * (moved / TARGET) ** 2 for name in DAMAGES}
    row |= {"kept": 2.0, "passed": 3.0, "generated": 4.0, "heal_barrier": 0.0, "heal_barrier_on": 0.0, "heal_idle": 0.0,
            "heal_shrink": 0.0, "heal_decays": 0.0, "dose": 0.5, "steered/kl_p95": 1.0}  # fmt: skip
    frontier = [{"gate": c} | means(c) for c in (0.25, 0.5, 0.75, 1.0)]
    if target is not None:
        row |= {"matched/target": target, "matched/reached": float(reached)}
    if reached:
        row["matched/gate"] = gate
        frontier.append({"gate": gate} | means(gate))
        put("round-0-matched", gate)
    said: dict[str, Any] = {who: [{"prompt": "Hello", "text": who}] for who in ("base", "steered", "healed")}
    told = [f"reg={reg}", *overrides, f"seed={seed}"]
    record = {
        "code": {"version": "0.1.0", "commit": None, "dirty": False}, "overrides": told, "regulariser": reg,
        "note": "made",
        "seconds": 10.0, "tau": None, "columns": [asdict(c) for c in KNOWN], "rounds": [row], "best": 0, "stopped": "",
        "answers": said, "frontier": [sorted(frontier, key=lambda r: r["gate"]) if target is not None else []],
        "rest": f"{list(rest or overrides)}", "teacher": teacher, "cell": f"{told}",
        "group": group or f"{told[:-1]}", 
        "basis": basis or {"model": "made up", "trait": "love"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(record))
    write_jsonl(folder / "metrics.jsonl", [{"heal/step": 0, "heal/nll": 2.0, "heal/kl_rev": 0.1, "heal/gnorm": 1.0}])
    return folder


def sweep(root: Path, damages: dict[str, float], seeds: int = 5, **how: Any) -> Path:
    """A folder with a run of each regulariser and seed."""
    for reg, damage in damages.items():
        for seed in range(seeds):
            finished(root / f"{reg}-{seed}", reg, seed, damage, **how)
    return root
