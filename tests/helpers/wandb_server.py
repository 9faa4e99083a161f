"""A stand-in for the W&B server, whose manners can be changed while it runs, and a reader of the files that W&B writes."""

from __future__ import annotations

import functools
import json
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = {
    "id": "run",
    "name": "run",
    "displayName": "run",
    "project": {"id": "project", "name": "digitdist", "entity": {"id": "entity", "name": "someone"}},
}
VIEWER = {"id": "viewer", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
INFO = {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None, "features": []}
ARTIFACT = {"id": "artifact", "state": "COMMITTED", "artifactSequence": {"id": "sequence", "latestArtifact": None}}
DATA = {
    "viewer": VIEWER,
    "serverInfo": INFO,
    "model": None,
    "project": None,
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "createArtifact": {"artifact": ARTIFACT},
}


class Server:
    """Listens on a free port; `manner` is one of answer, hang, fail, close; `asked` are the paths asked for."""

    def __init__(self, manner: str = "answer"):
        self.manner, self.asked = manner, []
        self.then: tuple[bytes, str] | None = None  # the manner after a request that has this in it
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": self.url}  # of a client with a key

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.body = self.rfile.read(length)
                server.asked.append((self.path, self.body))
                manner = server.manner
                if server.then and server.then[0] in self.body:
                    server.manner = server.then[1]
                match manner:
                    case "hang":
                        time.sleep(100)
                    case "close":
                        self.close_connection = True
                    case "fail":
                        self.reply(500, {})
                    case "answer":
                        self.reply(200, {"data": DATA | self.uploads()} if self.path == "/graphql" else {})

            do_GET = do_PUT = do_POST

            def uploads(self) -> dict:
                names = json.loads(self.body).get("variables", {}).get("files", [])
                files = [{"name": name, "uploadUrl": f"{server.url}/upload/{name}"} for name in names]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

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
