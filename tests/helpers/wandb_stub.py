"""A stand-in for the W&B server on the loopback, as much of it as runs need: init, resume status, rows, files, finish.

`fault` spoils every call, or those whose operation matches `fault_on`, until it is changed:
"500" a server error; "hang" no answer for `hang_s`; "reset" a closed connection; "empty" the `200 {"data": {}}` of a
captive portal. Operations are GraphQL names such as Viewer and UpsertBucket, or "POST /files/…/file_stream".
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import unquote, urlparse

ENTITY = "stub"


@dataclass
class Run:
    """Everything that the server received about a run."""

    info: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.history.items())]


class WandbStub:
    """Use as a context manager, with WANDB_BASE_URL set to `url`."""

    def __init__(self, hang_s: float = 30.0) -> None:
        self.fault: Literal["500", "hang", "reset", "empty"] | None = None
        self.fault_on = ""
        self.runs: dict[str, Run] = {}
        self.operations: list[str] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._hang_s = hang_s
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def fault_for(self, operation: str) -> str | None:
        with self._lock:
            self.operations.append(operation)
            fault = self.fault if re.search(self.fault_on, operation) else None
        if fault == "hang":
            self._stopped.wait(self._hang_s)
        return fault

    def answer(self, method: str, path: str, body: bytes, operation: str) -> dict[str, Any]:
        with self._lock:
            if path == "/graphql":
                return {"data": self._graphql(operation, json.loads(body).get("variables") or {})}
            if match := re.fullmatch(r"/files/.*/([^/]+)/file_stream", path):
                self._stream(self.runs[match[1]], json.loads(body))
                return {"exitcode": None, "limits": {}}
            if method == "PUT" and (match := re.fullmatch(r"/storage/([^/]+)/(.*)", path)):
                self.runs[match[1]].files[match[2]] = body
            return {}

    def _stream(self, run: Run, sent: dict[str, Any]) -> None:
        for name, chunk in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history.update(enumerate(chunk["content"], start=chunk["offset"]))
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        if sent.get("complete") is not None:
            run.exit_code = sent.get("exitcode")

    def _graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": ENTITY}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": ENTITY, "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            return {"model": project | {"bucket": None}}  # no run is known before it is first written to
        if operation == "UpsertBucket":
            return {"upsertBucket": self._upsert(given)}
        if operation == "CreateRunFiles":
            urls = [{"name": name, "uploadUrl": f"{self.url}/storage/{given['run']}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": urls}}
        return {}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or base64.b64decode(given["id"]).decode()
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run())
        run.info |= {key: value for key, value in given.items() if value is not None and key != "config"}
        if given.get("config"):
            run.config = {key: entry["value"] for key, entry in json.loads(given["config"]).items()}
        bucket = {
            "id": base64.b64encode(name.encode()).decode(),
            "name": name,
            "displayName": run.info.get("displayName") or name,
            "config": given.get("config"),
            "project": {"id": "p", "name": run.info.get("project"), "entity": {"id": "e", "name": ENTITY}},
            "historyLineCount": len(run.history),
        }
        return {"bucket": bucket, "inserted": inserted}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: WandbStub

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = unquote(urlparse(self.path).path)
        operation = _graphql_name(body) if path == "/graphql" else f"{self.command} {path}"
        fault = self.stub.fault_for(operation)
        if fault in ("hang", "reset"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "500":
            self._reply(500, {"error": "injected"})
        elif fault == "empty":
            self._reply(200, {"data": {}})
        else:
            self._reply(200, self.stub.answer(self.command, path, body, operation))

    do_GET = do_POST = do_PUT = _handle

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the tests look at `operations`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hung up: some tests are about just that."""


def _graphql_name(body: bytes) -> str:
    query = json.loads(body)
    match = re.search(r"(?:query|mutation)\s+(\w+)", query.get("query") or "")
    return query.get("operationName") or (match[1] if match else "")
