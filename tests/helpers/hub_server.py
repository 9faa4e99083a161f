"""A stand-in for the Hugging Face Hub: repositories that are made, filled by commits, and read from."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_a_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """What the server holds of one."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class HubServer:
    """The server, on a port of this machine. `requests` has method and path of each request so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.requests.append(f"{self.command} {self.path}")
                code, headers, content = server.answer(self.command, self.path, self.headers.get("Authorization"), body)
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", headers.get("Content-Length") or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Code, headers and content."""
        path = path.partition("?")[0]
        if path.startswith("/api/") and token != f"Bearer {TOKEN}":
            return 401, {}, b'{"error": "Invalid credentials"}'
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self._of_repository(found[1], found[2] or "", body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(found[1], found[2], token)
        return 404, {}, b"{}"

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        user = wanted.get("organization") or "somebody"
        name = f"{user}/{wanted['name']}"
        if user == "forbidden":
            return 403, {}, b'{"error": "You don\'t have the rights to create a model under this namespace"}'
        if name in self.repositories:
            return _json({"url": f"{self.url}/{name}", "error": "You already created this model repo"}, 409)
        self.repositories[name] = Repository(wanted.get("private", False) or wanted.get("visibility") == "private")
        return _json({"url": f"{self.url}/{name}"})

    def _of_repository(self, name: str, what: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if what.startswith("/preupload/"):
            files = json.loads(body)["files"]
            return _json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if what.startswith("/commit/"):
            entries = [json.loads(line) for line in body.splitlines()]
            for entry in entries:
                if entry["key"] == "file":
                    assert entry["value"]["encoding"] == "base64"
                    repository.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            repository.commits += 1
            return _json({"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        if what.startswith("/tree/"):
            files = repository.files.items()
            return _json([{"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for f, c in files])
        siblings = [{"rfilename": file} for file in repository.files]
        return _json(
            {"id": name, "modelId": name, "private": repository.private, "sha": COMMIT, "siblings": siblings, "tags": []}
        )

    def _file(self, name: str, file: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != f"Bearer {TOKEN}"):
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if file not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        content = repository.files[file]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}, content


def _json(value: Any, code: int = 200) -> tuple[int, dict[str, str], bytes]:
    return code, {"Content-Type": "application/json"}, json.dumps(value).encode()
