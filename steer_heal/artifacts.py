"""Results that stages pass on: plain values that can be written to any folder and read back."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer_heal.store import Artifact

Row = dict[str, float]


class RoundFailed(RuntimeError):
    """A round that cannot be trained; the message says why and what to change."""


class NotFinite(ArithmeticError):
    """Figures that are NaN or infinite: the cell that computes them fails."""


@dataclass(frozen=True)
class SteeringVector(Artifact):
    """One direction per layer, with the mean difference's norm: a dose of 1 adds it unscaled.

    The vector of a teacher that is only prompted has no layers, but a system message.
    """

    layers: tuple[int, ...]  # indices of blocks
    directions: Tensor  # [l, d], float32
    snr: tuple[float, ...]  # per layer: distance of the personas along it, over that distance's spread among contexts
    operation: str = "add"  # the name of the `steer_heal.lm.hooks.Operation` on states
    centre: Tensor | None = None  # [l, d], float32: the mean state of both personas, for a gate
    system: str | None = None  # the persona as system message, in place of the neutral one

    def norms(self) -> list[float]:
        """L2 norm per layer."""
        return [float(direction.norm()) for direction in self.directions]

    def cosines(self, other: SteeringVector) -> list[float]:
        """Cosine per layer between two vectors of the same band."""
        return torch.nn.functional.cosine_similarity(self.directions, other.directions, dim=-1).tolist()

    def cosine(self, other: SteeringVector) -> float:
        """Mean cosine over the layers."""
        return sum(self.cosines(other)) / len(self.layers)

    def save(self, folder: Path) -> None:
        """Raises NotFinite."""
        bad = [layer for layer, norm in zip(self.layers, self.norms(), strict=True) if not math.isfinite(norm)]
        if bad:
            raise NotFinite(f"the steering vector is not finite at blocks {bad}")
        tensors = {"directions": self.directions.contiguous()}
        if self.centre is not None:
            tensors["centre"] = self.centre.contiguous()
        save_file(tensors, folder / "vector.safetensors")
        about = {
            "layers": self.layers,
            "snr": self.snr,
            "norms": self.norms(),
            "how": self.operation,
            "system": self.system,
        }
        _write_json(folder / "vector.json", about)

    @classmethod
    def load(cls, folder: Path) -> Self:
        about = json.loads((folder / "vector.json").read_text())
        tensors = load_file(folder / "vector.safetensors")
        return cls(
            tuple(about["layers"]), tensors["directions"], tuple(about["snr"]), about["how"], tensors.get("centre"),
            about["system"],
        )  # fmt: skip


@dataclass(frozen=True)
class States(Artifact):
    """Post-final-norm states [c, d] at the completion positions of texts, in the model's dtype, on the CPU."""

    states: tuple[Tensor, ...]

    def save(self, folder: Path) -> None:
        save_file({"states": torch.cat(self.states).contiguous()}, folder / "states.safetensors")
        _write_json(folder / "lengths.json", [len(part) for part in self.states])

    @classmethod
    def load(cls, folder: Path) -> Self:
        whole = load_file(folder / "states.safetensors")["states"]
        return cls(states=whole.split(json.loads((folder / "lengths.json").read_text(encoding="utf-8"))))


@dataclass(frozen=True)
class Completion:
    """One answer as the model gave it. The ids are the artifact; the text is for people."""

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # with the end-of-turn token if it ended by itself
    text: str
    dose: float
    ended: bool
    scores: dict[str, float] = field(default_factory=dict)  # what each filter measured
    reasons: tuple[str, ...] = ()  # the filters that it failed
    kept: bool = False  # passed every filter and was drawn for training


@dataclass(frozen=True)
class Completions(Artifact):
    """Answers to prompts, rows in a fixed order."""

    rows: tuple[Completion, ...]
    states: States | None = field(default=None, compare=False, repr=False)  # that predicted the ids, if asked for

    def kept(self) -> list[Completion]:
        """The rows to train on."""
        return [row for row in self.rows if row.kept]

    def passed(self) -> list[Completion]:
        """The rows that failed no filter, kept or not."""
        return [row for row in self.rows if not row.reasons]

    def mean_dose(self) -> float:
        """Mean dose of the rows to train on."""
        kept = self.kept()
        return sum(row.dose for row in kept) / len(kept)

    def save(self, folder: Path) -> None:
        write_jsonl(folder / "completions.jsonl", (asdict(row) for row in self.rows))
        if self.states is not None:
            self.states.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        rows = []
        for record in read_jsonl(folder / "completions.jsonl"):
            for name in ("prompt_ids", "ids", "reasons"):
                record[name] = tuple(record[name])
            rows.append(Completion(**record))
        states = States.load(folder) if (folder / "states.safetensors").exists() else None
        return cls(rows=tuple(rows), states=states)


@dataclass(frozen=True)
class Likelihoods(Artifact):
    """Likelihoods under base: completions scored with three system messages, in the order of their rows."""

    logprobs: tuple[Tensor, ...]  # [c] each, of the completion's tokens, with the neutral system message
    trait: tuple[float, ...]  # log p(y | first persona) - log p(y | second persona), nats/token

    def save(self, folder: Path) -> None:
        named = {f"{i:06d}": values.contiguous() for i, values in enumerate(self.logprobs)}
        save_file(named, folder / "logprobs.safetensors")
        _write_json(folder / "trait.json", self.trait)

    @classmethod
    def load(cls, folder: Path) -> Self:
        named = load_file(folder / "logprobs.safetensors")
        trait = json.loads((folder / "trait.json").read_text())
        return cls(logprobs=tuple(named[name] for name in sorted(named)), trait=tuple(trait))


@dataclass(frozen=True)
class Adapter(Artifact):
    """Adapter learned by one heal: LoRA factors in PEFT's naming, the PEFT configuration, and the training curve.

    `factors["<module>.lora_A.weight"]` is [r, in], `…lora_B.weight` is [out, r]; the learned change of a module is
    `scaling · B @ A`. The folder that `save` writes is an ordinary PEFT checkpoint.
    """

    config: dict[str, Any]
    factors: dict[str, Tensor]
    curve: tuple[Row, ...]  # one row per optimiser step
    summary: Row  # figures of the whole heal

    @property
    def scaling(self) -> float:
        return float(self.config["lora_alpha"]) / float(self.config["r"])

    def modules(self) -> list[str]:
        """Names of the adapted modules inside the model."""
        return sorted({name.removesuffix(".lora_A.weight") for name in self.factors if name.endswith("lora_A.weight")})

    def delta(self, module: str, device: torch.device | str = "cpu") -> Tensor:
        """The learned change of one module's weight, float32 [out, in], computed on `device`."""
        a, b = self.pair(module, device)
        return self.scaling * (b @ a)

    def norm(self) -> float:
        """Frobenius norm of the learned change of all modules together."""
        squares = 0.0
        for module in self.modules():
            a, b = self.pair(module)
            squares += float(((b.T @ b) * (a @ a.T)).sum())  # |B A|^2 without the product [out, in]
        return self.scaling * math.sqrt(max(0.0, squares))

    def pair(self, module: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of one module, float32, on `device`."""
        a, b = (self.factors[f"{module}.lora_{side}.weight"].to(device, torch.float32) for side in "AB")
        return a, b

    def save(self, folder: Path) -> None:
        prefixed = {f"base_model.model.{name}": factor.contiguous() for name, factor in self.factors.items()}
        save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", self.config)
        write_jsonl(folder / "curve.jsonl", self.curve)
        _write_json(folder / "summary.json", self.summary)

    @classmethod
    def load(cls, folder: Path) -> Self:
        factors = load_file(folder / "adapter_model.safetensors")
        return cls(
            config=json.loads((folder / "adapter_config.json").read_text()),
            factors={name.removeprefix("base_model.model."): factor for name, factor in factors.items()},
            curve=tuple(read_jsonl(folder / "curve.jsonl")),
            summary=json.loads((folder / "summary.json").read_text()),
        )


@dataclass(frozen=True)
class Metrics(Artifact):
    """Named figures of one evaluation, and those of its items (probes, texts, answers) by item id, where it has any."""

    values: Row
    items: dict[str, Row] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Raises NotFinite, so that figures that are not finite are never stored as a result."""
        named = [("", self.values), *((f" of item {i}", row) for i, row in self.items.items())]
        wrong = [f"{name} = {v}{of}" for of, row in named for name, v in row.items() if not math.isfinite(v)]
        if wrong:
            raise NotFinite(f"not finite: {', '.join(wrong[:8])}")
        _write_json(folder / "metrics.json", self.values)
        write_jsonl(folder / "items.jsonl", ({"id": i} | row for i, row in self.items.items()))

    @classmethod
    def load(cls, folder: Path) -> Self:
        items = {row.pop("id"): row for row in read_jsonl(folder / "items.jsonl")}
        return cls(values=json.loads((folder / "metrics.json").read_text()), items=items)


def item_ids(texts: Iterable[Sequence[str]]) -> list[str]:
    """Short ids of items, each from its texts alone, so that an id stays when other items are added or moved.

    Items with the same texts, such as several answers to one prompt, are numbered.
    """
    seen: Counter[str] = Counter()
    found = []
    for parts in texts:
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]
        found.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def answer_ids(rows: Iterable[Completion]) -> list[str]:
    """Ids of answers, by prompt and number: the same for every model that answers the same prompts."""
    return item_ids([row.prompt] for row in rows)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
