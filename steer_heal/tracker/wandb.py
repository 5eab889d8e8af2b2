"""What a run measured: `metrics.jsonl` in its folder, always, and a W&B run beside it when one can be had.

The file is the truth: it is written first and flushed line by line, and an error in writing it ends the run.
W&B is a mirror that may fail at any moment and costs the run nothing but the mirror: one thread makes all calls to
it, under one guard, and the run waits for that thread only at its start and its end, and for a stated time.
This is the only module that imports wandb.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from loguru import logger
from pydantic import Field

from steer_heal.config import Config

# Seconds: for the question whether W&B is there; for wandb.init; for the last rows to be uploaded; and what wandb may
# take beyond its own limits (init was seen to add 10) before the run goes on without it.
PROBE_S, INIT_S, FINISH_S, GRACE_S = 3.0, 20.0, 30.0, 15.0


class TrackerConfig(Config):
    """Where a run's measurements go: metrics.jsonl, and whatever an option mirrors it to."""

    def open(self, run_dir: Path, *, config: dict[str, Any], group: str | None, run_name: str) -> Tracker:
        return Tracker(run_dir)


class JsonlConfig(TrackerConfig):
    """metrics.jsonl alone."""

    name: Literal["jsonl"]


class WandbConfig(TrackerConfig):
    """metrics.jsonl, mirrored to W&B. WANDB_MODE in the environment wins over `mode`.

    `auto` is online if there is an API key and the server answers to it within PROBE_S, else offline; it heeds what
    `wandb offline` has set. `online` is the same, but a missing key is a warning. To upload an offline run later:
    `wandb sync <run folder>/wandb/offline-run-*`.
    """

    name: Literal["wandb"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...]

    def open(self, run_dir: Path, *, config: dict[str, Any], group: str | None, run_name: str) -> Tracker:
        tracker = super().open(run_dir, config=config, group=group, run_name=run_name)
        # A run that begins again replays its rows: under one id they would be doubled, so to W&B it is another run.
        again = f"#{tracker.attempt}" if tracker.attempt else ""
        run_id = hashlib.sha1(f"{tracker.run_dir}{again}".encode()).hexdigest()[:12]
        run = self.model_dump(include={"project", "entity", "tags"})
        run |= {"id": run_id, "name": run_name[:120] + again, "group": group and group[:128]}
        tracker.mirror = _Mirror(run | {"dir": str(tracker.run_dir), "config": redact(config)}, mode=self.mode)
        return tracker


class Tracker:
    """One run's measurements. As a context manager it records exit code 1 when an exception passes through.

    metrics.jsonl is strict JSON, one row a line: NaN and the infinities, which JSON lacks, are the strings "nan",
    "inf" and "-inf", which `float()` reads back. Each row also holds `time`, in seconds since the run began.
    A run that begins again in the same folder replays its rows, so the file is begun anew; the one before is kept
    as metrics.1.jsonl, metrics.2.jsonl and so on, in the order in which they were made.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        free = next(n for n in count(1) if not (self.run_dir / f"metrics.{n}.jsonl").exists())
        self.attempt = free if path.exists() else free - 1  # 0 unless a run has begun in this folder before
        if path.exists():
            path.rename(self.run_dir / f"metrics.{free}.jsonl")
        self._file = path.open("x", encoding="utf-8")
        self._began = time.monotonic()
        self.mirror: _Mirror | None = None

    def log(self, row: Mapping[str, float | str]) -> None:
        """Record one row. Raises OSError if metrics.jsonl cannot be written, and nothing on account of W&B."""
        line = {k: str(float(v)) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line["time"] = round(time.monotonic() - self._began, 3)
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        kept = dict(row)
        self._send("rows", lambda wandb, run: run.log(kept))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show a run's final values in W&B. They are not written here: its rows and results hold them already."""
        kept = dict(values)
        self._send("rows", lambda wandb, run: run.summary.update(kept))

    def image(self, key: str, path: Path) -> None:
        """Show a picture in W&B. The file is read a little later, so it must not be written over."""
        where = str(path.resolve())
        self._send("media", lambda wandb, run: run.log({key: wandb.Image(where)}))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in W&B."""
        data = [list(row) for row in rows]
        self._send("media", lambda wandb, run: run.log({key: wandb.Table(columns=list(columns), data=data)}))

    def histogram(self, key: str, values: Sequence[float]) -> None:
        """Show in W&B how values are spread."""
        kept = list(values)
        self._send("media", lambda wandb, run: run.log({key: wandb.Histogram(kept, num_bins=64)}))

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run, within FINISH_S and twice GRACE_S, and close the file. Harmless when repeated."""
        mirror, self.mirror = self.mirror, None
        try:
            if mirror:
                mirror.finish(exit_code)
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _send(self, what: str, call: Callable[[Any, Any], object]) -> None:
        if self.mirror:
            self.mirror.calls.put((what, call))


class _Mirror:
    """One W&B run, from wandb.setup to wandb.teardown, on its own thread, which takes `(what, call)` from a queue.

    wandb blocks where one would not think it: a helper process that has stopped makes even `log` wait for ever.
    Every run gets a fresh session, since one left over ignores the environment of the next job in the process.
    """

    def __init__(self, run: dict[str, Any], *, mode: str) -> None:
        self.calls: queue.SimpleQueue[tuple[str, Callable[[Any, Any], object]] | None] = queue.SimpleQueue()
        self._init, self._mode, self._exit_code = run, mode, 0
        self._wandb: Any = None
        self._session: Any = None
        self._run: Any = None
        self._failed: set[str] = set()
        here = f"{run['dir']}/wandb"  # tables are staged in the data folder, by default in the user's home
        ours = {"ERROR_REPORTING": "false", "DATA_DIR": f"{here}/data", "CACHE_DIR": f"{here}/cache"}
        self._environ = {f"WANDB_{key}": value for key, value in ours.items() if f"WANDB_{key}" not in os.environ}
        os.environ.update(self._environ)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        # No row would be lost without this wait, but two threads that import large libraries at once can deadlock.
        self._started.wait(PROBE_S + INIT_S + GRACE_S)

    def finish(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self.calls.put(None)
        self._thread.join(FINISH_S + GRACE_S)
        if self._thread.is_alive():
            with self._guarded("finish"):
                self._session._connection._proc._process.kill()  # wandb would wait for it at exit, and cannot end it
                raise TimeoutError("no answer, so its helper process was ended")
            self._thread.join(GRACE_S)
        for key in self._environ:
            os.environ.pop(key, None)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Let a failure of W&B end in one warning, and nothing else.

        The only `except Exception` of the project. What wandb raises cannot be listed (its own errors, those of
        urllib, asyncio and protobuf, AssertionError; teardown even calls sys.exit), and none is worth losing a run.
        """
        try:
            yield
        except (Exception, SystemExit) as error:  # noqa: BLE001
            known = self._failed & {what, "start", "rows", "finish"}  # without the mirror there is no news of it
            self._failed.add(what)
            message = f"W&B: {what} failed: {type(error).__name__}: {str(error)[:300]}; metrics.jsonl has every row"
            logger.log("DEBUG" if known else "WARNING", "{}", message)

    def _work(self) -> None:
        with self._guarded("start"):
            self._start()
        self._started.set()
        while (job := self.calls.get()) is not None:
            what, call = job
            # When the server is away, each picture or table takes 19 s to fail: after the first, rows only.
            if self._run is not None and not self._failed & {what, "rows"}:
                with self._guarded(what):
                    call(self._wandb, self._run)
        with self._guarded("finish"):
            try:
                if self._run is not None:
                    self._run.finish(exit_code=self._exit_code)
            finally:
                self._wandb.teardown()

    def _start(self) -> None:
        """Begin the run online, or offline if that is wanted or online fails; WANDB_MODE=disabled: not at all."""
        import wandb

        self._wandb = wandb
        self._open_session()
        given = self._session.settings.mode  # by the environment, or by wandb's own settings files
        mode = given if self._mode == "auto" or os.environ.get("WANDB_MODE") else self._mode
        if mode == "disabled":
            return
        if mode not in {"offline", "dryrun"} and self._reachable():
            with self._guarded("online"):
                return self._begin("online")
            with self._guarded("online"):
                wandb.teardown()
            self._open_session()
        self._begin("offline")

    def _open_session(self) -> None:
        private = {"disable_git", "disable_code", "x_disable_stats", "x_disable_meta"}  # meta: host, command line
        settings = dict.fromkeys(private, True) | {"x_save_requirements": False, "console": "off", "silent": True}
        limits = {"init_timeout": INIT_S, "finish_timeout": FINISH_S, "finish_timeout_raises": True}
        limits |= {"x_transaction_log_flush_interval": 1.0}  # s; by default a killed run loses its last 15 s
        self._session = self._wandb.setup(self._wandb.Settings(**settings, **limits))

    def _reachable(self) -> bool:
        """Whether there is a key that the server knows: wandb.init prompts without one, and dies on a login page."""
        with self._guarded("online"):
            from wandb.sdk.lib.wbauth import authenticate_session  # looks for the key where wandb.init does

            host = self._session.settings.base_url
            auth = authenticate_session(host=host, source="steer_heal", prompt=False, update_session=False)
            key = getattr(auth, "api_key", None)
            if auth is None or key is None:
                level = "WARNING" if self._mode == "online" else "INFO"
                logger.log(level, "W&B: there is no API key, so the run is recorded offline")
                return False
            query = json.dumps({"query": "query Viewer { viewer { id } }", "operationName": "Viewer"}).encode()
            request = urllib.request.Request(f"{auth.host.url}/graphql", query, {"Content-Type": "application/json"})
            secret = base64.b64encode(f"api:{key}".encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {secret}")  # not for whom a redirect leads to
            with urllib.request.urlopen(request, timeout=PROBE_S) as response:
                answer = json.loads(response.read(65536))
            if (answer.get("data") or {}).get("viewer"):
                return True
            raise ConnectionError("the answer is not from W&B, or it does not know the API key")
        return False

    def _begin(self, mode: Literal["online", "offline"]) -> None:
        run = self._wandb.init(mode=mode, resume="allow", reinit="finish_previous", **self._init)
        for step, metrics in (
            ("heal/step", "heal/*"),
            ("round/index", "round/*"),
            ("dose/trial", "dose/*"),
            ("vector/layer", "vector/*"),
        ):
            run.define_metric(step, hidden=True)
            run.define_metric(metrics, step_metric=step)
        self._run = run


def redact(config: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The configuration as plain JSON values that may be uploaded.

    Hidden are texts and collections under a key that names a secret (`hf_token`, `apiKey`; not `tokenizer`,
    `max_new_tokens`), and texts that hold the value of such an environment variable, whatever their key.
    """
    secrets = [value for key, value in environ.items() if _is_secret(key) and len(value) >= 8]

    def clean(value: Any, secret: bool = False) -> Any:
        if value is None or isinstance(value, (bool, int, float)):  # `token: false`, `token: -1`: a switch, a position
            return value
        if isinstance(value, Mapping) and not secret:
            return {str(key): clean(inner, _is_secret(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)) and not secret:
            return [clean(inner) for inner in value]
        return "<redacted>" if secret or any(hidden in str(value) for hidden in secrets) else str(value)

    return clean(config)


def _is_secret(key: object) -> bool:
    """Whether a name ends in a word for a secret: `hf_token`, `wandb_api_key`, `authToken`."""
    words = r"(token|secret|pass(word|wd|phrase)|credentials?|authorization|(api|access|secret|private|auth)_?key)$"
    return re.search(rf"(^|[^a-z0-9]){words}", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower()) is not None
