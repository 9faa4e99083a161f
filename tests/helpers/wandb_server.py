"""A stand-in for the W&B server, which keeps of a run what a real one would, and whose manners can be changed while it runs.
And a reader of the files that W&B writes."""

from __future__ import annotations

import functools
import gzip
import json
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

PROJECT = {
    "id": "project",
    "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",
    "name": "digitdist",
    "entity": {"id": "entity", "name": "someone"},
}
VIEWER = {"id": "viewer", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}, "name": "someone"}
INFO = {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None, "features": []}
SEQUENCE = {"id": "sequence", "name": "weights", "latestArtifact": None}
ARTIFACT = {"id": "artifact", "state": "COMMITTED", "artifactSequence": SEQUENCE}
TYPE = {"fields": [], "inputFields": [{"name": name} for name in ("clientID", "sequenceClientID", "distributedID", "tags")]}


@dataclass
class StoredRun:
    """What a W&B server keeps of a run."""

    name: str
    upserted: dict[str, Any] = field(default_factory=dict)  # variables of the last mutation that made or changed it
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file to its lines by offset
    files: set[str] = field(default_factory=set)  # uploaded
    exit_code: int | None = None
    preempting: bool = False
    resumes: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, in the order of its offsets."""
        return [json.loads(line) for _, line in sorted(self.streams.get("wandb-history.jsonl", {}).items())]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.streams.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def config(self) -> dict[str, Any]:
        return {key: value["value"] for key, value in json.loads(self.upserted.get("config") or "{}").items()}

    @property
    def state(self) -> str:
        if self.exit_code is None:
            return "running"
        return "finished" if self.exit_code == 0 else "preempted" if self.preempting else "failed"

    def take(self, body: dict[str, Any]) -> None:
        """A request to its file stream. Lines replace those that have their offsets."""
        for name, chunk in (body.get("files") or {}).items():
            lines = self.streams.setdefault(name, {})
            lines.update(enumerate(chunk["content"], chunk["offset"]))
        self.preempting = body.get("preempting") or (self.preempting and bool(body.get("complete")))
        self.exit_code = body.get("exitcode", 0) if body.get("complete") else None

    def tail(self, name: str) -> str:
        """The last line of a file stream, as the only one of a JSON list."""
        lines = self.streams.get(name, {})
        return json.dumps([lines[max(lines)]] if lines else [])

    def bucket(self) -> dict[str, Any]:
        """The run as GraphQL tells it."""
        rows, summary, given = self.rows, json.dumps(self.summary), self.upserted
        counts = {name: len(self.streams.get(file, {})) for name, file in STREAMS.items()}
        files = [{"node": file_node(name)} for name in sorted(self.files)]
        return {
            "id": self.name,
            "name": self.name,
            "displayName": given.get("displayName") or self.name,
            "project": PROJECT | {"name": given.get("project") or PROJECT["name"]},
            "projectId": 1,
            "state": self.state,
            "tags": given.get("tags") or [],
            "group": given.get("groupName"),
            "config": given.get("config") or "{}",
            "summaryMetrics": summary,
            "systemMetrics": "{}",
            "user": VIEWER,
            "historyTail": self.tail("wandb-history.jsonl"),
            "eventsTail": self.tail("wandb-events.jsonl"),
            **counts,
            "historyKeys": {"lastStep": rows[-1]["_step"] if rows else -1, "keys": {}, "sets": []},
            "wandbConfig": '{"t": {}}',
            "files": {"edges": files, "pageInfo": {"endCursor": None, "hasNextPage": False}},
            "fileCount": len(files),
            "jobType": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "description": None,
            "heartbeatAt": "2026-01-01T00:00:00",
            "notes": given.get("notes"),
            "sweepName": None,
            "sweep": None,
            "storageId": self.name,
            "stopped": False,
            "writeMode": "WRITABLE",
        }


STREAMS = {
    "historyLineCount": "wandb-history.jsonl",
    "eventsLineCount": "wandb-events.jsonl",
    "logLineCount": "output.log",
}


def file_node(name: str) -> dict[str, Any]:
    node = {"id": name, "name": name, "url": "", "directUrl": "", "sizeBytes": "1", "mimetype": "", "md5": ""}
    return node | {"updatedAt": "2026-01-01T00:00:00", "digest": ""}


class Server:
    """Listens on a free port. `manner` is one of answer, hang, fail, close, refuse (401 to all), drop (401 to the
    file stream and to uploads), lose (uploads);
    `asked` are the paths asked for with their bodies, `runs` what is kept of each run by its id."""

    def __init__(self, manner: str = "answer"):
        self.manner, self.asked = manner, []
        self.then: tuple[bytes, str] | None = None  # the manner after a request that has this in it
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": self.url}  # of a client with a key

    @property
    def run(self) -> StoredRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Does what a request asks for, and returns the answer."""
        with self._lock:
            if path == "/graphql":
                asked = json.loads(body)
                return {"data": self._graphql(asked.get("query", ""), asked.get("variables") or {})}
            if path.endswith("/file_stream"):
                run = unquote(path.split("/")[-2])
                self.runs.setdefault(run, StoredRun(run)).take(json.loads(body))
            if path.startswith("/upload/"):
                _, _, run, name = path.split("/", 3)
                self.runs[unquote(run)].files.add(unquote(name))
            return {}

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        data: dict[str, Any] = {"viewer": VIEWER, "serverInfo": INFO, "model": None, "project": None, "TypeInfo": TYPE}
        name = given.get("name") or given.get("run") or given.get("runName") or given.get("runId") or ""
        if "upsertBucket" in query:
            new = name not in self.runs
            run = self.runs.setdefault(name, StoredRun(name))
            run.upserted |= {key: value for key, value in given.items() if value is not None}
            data["upsertBucket"] = {"bucket": run.bucket(), "inserted": new}
        elif "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{name}/{file}"} for file in given.get("files", [])]
            data["createRunFiles"] = {"runID": name, "uploadHeaders": [], "files": files}
        elif "createArtifact(" in query:
            self.artifacts.append(given)
            data["createArtifact"] = {"artifact": ARTIFACT}
        elif name in self.runs:
            bucket = self.runs[name].bucket()
            data["model"] = {"bucket": bucket, **PROJECT}
            data["project"] = {**PROJECT, "run": bucket}
            self.runs[name].resumes += "historyTail" in query
        return data

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                server.asked.append((self.path, body))
                manner = server.manner
                if server.then and server.then[0] in body:
                    server.manner = server.then[1]
                match manner:
                    case "hang":
                        time.sleep(100)
                    case "close":
                        self.close_connection = True
                    case "fail":
                        self.reply(500, {})
                    case "refuse":
                        self.reply(401, {"errors": [{"message": "unauthorized"}]})
                    case "drop" if self.path != "/graphql":
                        self.reply(401, {})
                    case "lose" if self.path.startswith("/upload/"):
                        self.reply(200, {})
                    case _:
                        self.reply(200, server.answer(self.path, body))

            do_GET = do_PUT = do_POST

            def reply(self, code: int, content: dict) -> None:
                text = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def records(folder: Path) -> list[Any]:
    """What a segment's ``.wandb`` file holds: records in the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if left < 7 or kind == 0:  # the rest of a block is padding
            at += left
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several pieces
            found.append(Record.FromString(whole))
            whole = b""
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows that a segment has logged; a table or an image is a mapping."""
    found = []
    for record in records(folder):
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                *groups, last = item.nested_key or [item.key]
                functools.reduce(lambda into, group: into.setdefault(group, {}), groups, row)[last] = json.loads(
                    item.value_json
                )
            found.append(row)
    return found
