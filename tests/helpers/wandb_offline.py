"""Read an offline W&B run back without a server: a `.wandb` file is a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_HEADER = 7  # ":W&B", two bytes of magic, one of version
BLOCK = 32768  # a record that does not fit in a block's rest goes on in the next
FULL, LAST = 1, 4  # the fragments that complete a record


@dataclass
class OfflineRun:
    run_id: str = ""
    group: str = ""
    name: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)  # "heal/*" → "heal/step"
    hidden: set[str] = field(default_factory=set)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """The offline W&B runs in a run's folder, oldest first."""
    return [read_run(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]


def read_run(path: Path) -> OfflineRun:
    out = OfflineRun()
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            out.run_id, out.group, out.name, out.project = run.run_id, run.run_group, run.display_name, run.project
            out.tags = list(run.tags)
            out.config |= _values(run.config.update)
        elif kind == "config":
            out.config |= _values(record.config.update)
        elif kind == "metric":
            metric = record.metric
            if metric.options.hidden:
                out.hidden.add(metric.name)
            if metric.step_metric:
                out.step_metrics[metric.glob_name or metric.name] = metric.step_metric
        elif kind == "history":
            out.rows.append(_values(record.history.item))
        elif kind == "summary":
            out.summary |= _values(record.summary.update)
        elif kind == "exit":
            out.exit_code = record.exit.exit_code
    return out


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2  # generated, without types
    log = path.read_bytes()
    assert log.startswith(b":W&B"), f"{path} is not a .wandb file"
    at, whole = FILE_HEADER, b""
    while at + 7 <= len(log):
        if BLOCK - at % BLOCK < 7:  # padding: a header does not straddle blocks
            at += BLOCK - at % BLOCK
            continue
        _checksum, size, kind = struct.unpack_from("<IHB", log, at)
        at += 7
        if kind == 0 or at + size > len(log):  # the torn tail of a run that was killed
            return
        whole += log[at : at + size]
        at += size
        if kind in (FULL, LAST):
            record = proto.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
