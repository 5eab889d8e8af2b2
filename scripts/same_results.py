"""Compare two commits to the last digit: store keys, logged rows, results and exit codes.

    python scripts/same_results.py HEAD~1 HEAD          # `.` is the working tree, changes included

Each commit is unpacked into a temporary folder and runs the same commands on the tiny model, in one process per commit
that forks for every command. Compared are the sequence of stages and keys that the store returned, every call of the
tracker, metrics.jsonl, result.json, the files of the run, its status and the exit code; only durations are left out.
Exit status: 0 if all are equal, 1 if something differs, which is then named.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = ("experiment=tiny", "heal.epochs=1", "runtime.store=../store")
CASES: dict[str, tuple[str, ...]] = {
    "kl_rev": ("reg=kl_rev",),
    "kl_fwd": ("reg=kl_fwd",),
    "nll": ("reg=nll",),
    "wd": ("reg=wd",),
    "wd by step": ("reg=wd", "decay=step", "lam=50"),
    "tau at a percentile, two rounds": ("reg=kl_rev", "tau=p75", "n_rounds=2"),
    "tau auto, largest position": ("reg=kl_fwd", "tau=auto", "heal.agg=max"),
    "two rounds against base": ("n_rounds=2",),
    "two rounds, each against the last": ("n_rounds=2", "heal.reference=prev", "heal.agg=rmse", "reg=kl_fwd"),
    "walk": ("dose=walk", "filter.perplexity.max=150"),
    "iso_kl": ("dose=iso_kl",),
    "pca": ("steer=pca",),
    "logistic": ("steer=logistic", "reg=nll"),
    "cosine_gated": ("steer=cosine_gated", "reg=nll"),
    "ablate": ("steer=ablate", "reg=nll"),
    "random": ("steer=random", "reg=nll"),
    "prompt": ("steer=prompt", "reg=nll"),
    "file": ("steer=file", "steer.path=../vector.safetensors", "reg=nll"),
    "layers auto, upper blocks": ("steer.layers=auto", "lora.first=0.5", "n_rounds=2", "reg=nll"),
    "bfloat16, filtered, topped up": ("model.dtype=bfloat16", "filter.perplexity.max=150", "heal.n_keep=80", "reg=nll"),
    "collapse": ("n_rounds=3", "min_coherence=1"),
    "too few at first": ("filter.length.min=13",),
    "no dose": ("dose=iso_kl", "dose.target=1e-9"),
    "heal fails at first": ("heal.lr=1e30", "heal.warmup=0", "heal.epochs=3"),
    "heal fails in a later round": (
        "lam=100",
        "heal.max_gnorm=1.3",
        "heal.epochs=3",
        "heal.reference=prev",
        "n_rounds=2",
    ),
    "a sweep": ("-m", "reg=nll,kl_rev", "lam=0.1,1", "hydra.sweep.dir=sweep"),
    "a sweep with a cell that fails": ("-m", "reg=nll", "heal.lr=1e-2,1e30", "heal.epochs=3", "hydra.sweep.dir=sweep"),
    "a bad value": ("lam=-1",),
    "an unknown option": ("reg=kl",),
    "blocks that are not there": ("steer.layers=[99]",),
}
TIMED = ("time", "seconds", "store_seconds", "heal_seconds")  # also after a prefix such as round/
PLACED = ("runtime", "owner", "began", "ended", "traceback")  # where and when it ran, not its results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-results-") as scratch:
        traces = [_traced(commit, Path(scratch) / f"{i}", given.only) for i, commit in enumerate(given.commits)]
    unlike = 0
    for case in given.only:
        one, other = (trace[case] for trace in traces)
        differ = next(
            ((i, pair) for i, pair in enumerate(itertools.zip_longest(one, other)) if pair[0] != pair[1]), None
        )
        print(f"{case}: {'equal' if differ is None else 'DIFFERS'}, {len(one)} records")
        if differ is not None:
            unlike += 1
            for commit, record in zip(given.commits, _parts_that_differ(*differ[1]), strict=True):
                print(f"  record {differ[0]} of {commit}: {json.dumps(record)[:2000]}")
    print("equal" if not unlike else f"{unlike} of {len(given.only)} cases differ")
    return int(unlike > 0)


def _parts_that_differ(one: Any, other: Any) -> tuple[Any, Any]:
    """Two records cut down to the fields in which they differ, where they have fields."""
    pair = [record[-1] for record in (one, other) if isinstance(record, list) and isinstance(record[-1], dict)]
    if len(pair) < 2:
        return one, other
    names = [name for name in {**pair[0], **pair[1]} if pair[0].get(name) != pair[1].get(name)]
    return tuple([*record[:-1], {name: record[-1].get(name) for name in names}] for record in (one, other))  # type: ignore[return-value]


def _traced(commit: str, folder: Path, cases: list[str]) -> dict[str, list[Any]]:
    """Records of every case at a commit."""
    tree = ROOT
    if commit != ".":
        tree = folder / "tree"
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(tree, filter="data")
    runs = folder / "runs"
    runs.mkdir(parents=True)
    _vector(runs / "vector.safetensors")
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, __file__, "--serve", str(tree), str(runs), *cases]
    subprocess.run(command, env=environ, check=True)
    return {case: list(_records(runs / f"{list(CASES).index(case)}")) for case in cases}


def _vector(path: Path) -> None:
    """Write a vector for two blocks of the tiny model."""
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    save_file({f"direction.{layer}": torch.randn(32, generator=rng) for layer in (1, 2)}, path)


def _records(folder: Path) -> Iterator[Any]:
    """The calls of a case, then the contents of its folder."""
    for line in (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines():
        yield _plain(json.loads(line))
    hidden = {".hydra"}
    paths = [path for path in folder.rglob("*") if path.is_file() and not hidden & set(path.parts)]
    named = {_unstamped(path.relative_to(folder)): path for path in paths}
    for name, path in sorted(named.items()):
        yield ["file", name]
        if path.name in ("result.json", "status.json"):
            content = _plain(json.loads(path.read_text(encoding="utf-8")))
            if "used" in content:  # by key, with names; a list of keys in earlier versions
                content["used"] = list(dict.fromkeys(content["used"]))
            for words in ("message", "stopped"):  # of an error's words only the beginning; the others may be mended
                if words in content:
                    content[words] = content[words].partition(":")[0]
            yield [name, content]
        if path.name == "metrics.jsonl":
            yield from ([name, _plain(json.loads(line))] for line in path.read_text(encoding="utf-8").splitlines())


def _unstamped(path: Path) -> str:
    """A path without the day and the time in the name of a single run's folder."""
    parts = list(path.parts)
    if parts[0] == "outputs":
        parts[1:3] = ["<day>", "<time>-" + parts[2].rpartition("-")[2]]
    return "/".join(parts)


def _plain(value: Any) -> Any:
    """A value without durations and places."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k.rpartition("/")[2] not in TIMED and k not in PLACED}
        return {k: _plain(v) for k, v in kept.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _serve(tree: Path, runs: Path, cases: list[str]) -> None:
    """Import everything, in a process whose steer_heal is that of `tree`, then fork for each case."""
    import steer_heal

    assert Path(steer_heal.__file__).is_relative_to(tree), f"{steer_heal.__file__} is not of {tree}"
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch

    _named("load_all", "steer_heal.sweep.cell", "steer_heal.main")()
    torch.set_num_threads(1)
    for case in cases:
        folder = runs / f"{list(CASES).index(case)}"
        folder.mkdir()
        if not (pid := os.fork()):
            _run(folder, CASES[case])
        os.waitpid(pid, 0)


def _run(folder: Path, arguments: tuple[str, ...]) -> None:
    """Run one command in a fork, and end the fork."""
    code: Any = 70
    with (folder / "trace.jsonl").open("w", encoding="utf-8") as trace:
        try:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(folder)
            _watch(lambda *record: print(json.dumps(record, default=str), file=trace, flush=True))
            sys.argv = ["main", *arguments[:1], *TINY, *arguments[1:]]
            runpy.run_module("steer_heal.main", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:  # any: it is what a commit does, and is printed to be compared
            traceback.print_exc()
            raise
        finally:
            print(json.dumps(["exit", code]), file=trace, flush=True)
            os._exit(0)


def _watch(record: Any) -> None:
    """Make the store and the tracker record what they are asked for."""
    from steer_heal.store import Store

    tracker = _named("Tracker", "steer_heal.tracker", "steer_heal.tracking")

    plain: Any = Store.__call__

    def watched(store: Any, *what: Any, **how: Any) -> Any:
        artifact = plain(store, *what, **how)
        place = store.where(artifact)
        record("store", place and place.parent.name, artifact.key)
        return artifact

    Store.__call__ = watched  # type: ignore[assignment]
    for name in ("log", "summary", "image", "table", "histogram"):
        _spy(tracker, name, record)


def _named(name: str, *modules: str) -> Any:
    """The object of this name in the first of the modules that has it: it may have moved between two commits."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise LookupError(f"none of {', '.join(modules)} has {name}")


def _spy(kind: type, name: str, record: Any) -> None:
    original = getattr(kind, name)

    @functools.wraps(original)
    def watched(self: Any, *what: Any) -> Any:
        record("tracker", name, *(what[:1] if name == "image" else what))
        return original(self, *what)

    setattr(kind, name, watched)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
