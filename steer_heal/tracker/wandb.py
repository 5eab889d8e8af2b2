"""Mirror of metrics.jsonl to a W&B run: the only module that imports wandb.

W&B may fail at any time, and then the run loses only the mirror: one thread makes all calls to wandb, under one guard,
and the run waits for that thread only at its start and its end, with a timeout.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from loguru import logger
from pydantic import Field

from steer_heal.tracker import Tracker, TrackerConfig

# Timeouts in seconds: to probe for W&B; for wandb.init; to upload the last rows; and the time wandb may take beyond
# its own limits (init was observed to add 10) before the run continues without it.
PROBE_S, INIT_S, FINISH_S, GRACE_S = 3.0, 20.0, 30.0, 15.0

# Variables that say which run this is, as an agent sets them: hidden from the cells of a sweep, which are several.
OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RESUME", "WANDB_NAME")


class WandbConfig(TrackerConfig):
    """Measurements go to metrics.jsonl, mirrored to W&B. WANDB_MODE in the environment takes precedence over `mode`.

    `auto` is online if there is an API key and the server accepts it within PROBE_S, else offline; it respects the
    setting made by `wandb offline`. `online` is the same, but a missing key is a warning. An offline run is uploaded
    later with `wandb sync <run folder>/wandb/offline-run-*`.
    """

    name: Literal["wandb"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...]

    def open(self, run_dir: Path, *, config: dict[str, Any], group: str | None, run_name: str) -> Tracker:
        tracker = super().open(run_dir, config=config, group=group, run_name=run_name)
        # A restarted run replays its rows: under the same id they would be duplicated, so it gets a new id in W&B.
        again = f"#{tracker.attempt}" if tracker.attempt else ""
        run_id = hashlib.sha1(f"{tracker.run_dir}{again}".encode()).hexdigest()[:12]
        run = self.model_dump(include={"project", "entity", "tags"}) | {"id": run_id, "name": run_name[:120] + again}
        run |= _asked(run, None if group is None else group[:128])
        run |= {"dir": str(tracker.run_dir), "config": redact(config)}
        tracker.mirror = _Mirror(run, mode=self.mode, hidden=() if group is None else OF_ONE_RUN)
        return tracker


def _asked(run: Mapping[str, Any], group: str | None) -> dict[str, Any]:
    """What the environment asks of a W&B run, in place of what it would be called.

    A single run takes WANDB_RUN_ID, which an agent sets and follows, and WANDB_NAME. The cells of a sweep (`group`)
    are runs of their own, so that their names begin with WANDB_NAME; they stay in the project of an agent's sweep.
    """
    given = {key: os.environ.get(f"WANDB_{key}", "") for key in ("RUN_ID", "NAME", "RUN_GROUP")}
    found: dict[str, Any] = {"group": given["RUN_GROUP"] or group}
    if group is None:
        found |= {field: given[key] for field, key in (("id", "RUN_ID"), ("name", "NAME")) if given[key]}
    elif given["NAME"]:
        found["name"] = f"{given['NAME'][:60]} {run['name'][-60:]}"
    if os.environ.get("WANDB_SWEEP_ID"):
        fields = {field: os.environ.get(f"WANDB_{field.upper()}") for field in ("project", "entity")}
        found |= {field: value for field, value in fields.items() if value}
    if not run["tags"]:
        found["tags"] = None  # then WANDB_TAGS counts
    return found


class _Mirror:
    """One W&B run, from wandb.setup to wandb.teardown, on its own thread, which takes `(what, call)` from a queue.

    wandb blocks in unexpected places: if its helper process has stopped, even `log` waits forever.
    Every run gets a fresh session, since a leftover one ignores the environment of the next job in the process.
    """

    def __init__(self, run: dict[str, Any], *, mode: str, hidden: Sequence[str] = ()) -> None:
        self.calls: queue.SimpleQueue[tuple[str, Callable[[Any, Any], object]] | None] = queue.SimpleQueue()
        self._init, self._mode, self._exit_code = run, mode, 0
        self._wandb: Any = None
        self._session: Any = None
        self._run: Any = None
        self._failed: set[str] = set()
        here = f"{run['dir']}/wandb"  # wandb stages tables in the data folder, by default in the user's home
        ours = {"ERROR_REPORTING": "false", "DATA_DIR": f"{here}/data", "CACHE_DIR": f"{here}/cache"}
        self._environ = {f"WANDB_{key}": value for key, value in ours.items() if f"WANDB_{key}" not in os.environ}
        self._hidden = {key: os.environ.pop(key) for key in hidden if key in os.environ}
        os.environ.update(self._environ)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        # No row would be lost without this wait, but two threads importing large libraries at once can deadlock.
        self._started.wait(PROBE_S + INIT_S + GRACE_S)

    def send(self, what: str, call: Callable[[Any, Any], object]) -> None:
        self.calls.put((what, call))

    def finish(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self.calls.put(None)
        self._thread.join(FINISH_S + GRACE_S)
        if self._thread.is_alive():
            with self._guarded("finish"):
                self._session._connection._proc._process.kill()  # else wandb waits for it at exit, unable to end it
                raise TimeoutError("no answer, so its helper process was killed")
            self._thread.join(GRACE_S)
        for key in self._environ:
            os.environ.pop(key, None)
        os.environ.update(self._hidden)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn a failure of W&B into one warning.

        A broad `except` is needed: the errors that wandb raises cannot be listed (its own, those of urllib, asyncio
        and protobuf, AssertionError; teardown even calls sys.exit), and none of them is worth losing a run.
        """
        try:
            yield
        except (Exception, SystemExit) as error:  # noqa: BLE001
            known = self._failed & {what, "start", "rows", "finish"}  # the mirror has failed already: no second warning
            self._failed.add(what)
            message = f"W&B: {what} failed: {type(error).__name__}: {str(error)[:300]}; metrics.jsonl has every row"
            logger.log("DEBUG" if known else "WARNING", "{}", message)

    def _work(self) -> None:
        with self._guarded("start"):
            self._start()
        self._started.set()
        while (job := self.calls.get()) is not None:
            what, call = job
            # If the server is unreachable, each image or table takes 19 s to fail: after the first failure, rows only.
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
        """Start the run online, or offline if that is set or online fails; do not start it if WANDB_MODE=disabled."""
        import wandb

        self._wandb = wandb
        self._open_session()
        given = self._session.settings.mode  # set by the environment or wandb's settings files
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
        """True if there is a key that the server accepts: wandb.init prompts without one, and fails on a login page."""
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
            request.add_unredirected_header("Authorization", f"Basic {secret}")  # not sent to the target of a redirect
            with urllib.request.urlopen(request, timeout=PROBE_S) as response:
                answer = json.loads(response.read(65536))
            if (answer.get("data") or {}).get("viewer"):
                return True
            raise ConnectionError("the answer is not from W&B, or W&B rejects the API key")
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
    """Convert the configuration to plain JSON values that are safe to upload.

    Redacted are texts and collections under a key that names a secret (`hf_token`, `apiKey`; not `tokenizer`,
    `max_new_tokens`), and texts that contain the value of such an environment variable, whatever their key.
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
    """True if a name ends in a word for a secret: `hf_token`, `wandb_api_key`, `authToken`."""
    words = r"(token|secret|pass(word|wd|phrase)|credentials?|authorization|(api|access|secret|private|auth)_?key)$"
    return re.search(rf"(^|[^a-z0-9]){words}", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower()) is not None
