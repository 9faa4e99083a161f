"""A small HTTP server for this machine alone: a few fixed pages, and one address that answers about a posted picture.

It listens on 127.0.0.1. A page of another site that the user has open cannot use it: a request must name this machine as its
host, which one after DNS rebinding does not, and one that comes from a page must come from the page served here.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, NamedTuple

from digitdist.errors import UserError, in_one_line

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")  # with any port, since a tunnel may have another one at its beginning
MAX_BYTES = 2**25  # of a picture
IDLE_S = 60  # in which a connection must go on

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Content(NamedTuple):
    """What an address gives: its media type, and its bytes."""

    type: str
    body: bytes


class DemoServer(ThreadingHTTPServer):
    """Listens on a port of this machine, 0 for any that is free; requests wait until `serve` is called.

    Raises:
        UserError: the port cannot be had.
    """

    daemon_threads = True  # an open connection does not keep the process
    pages: Mapping[str, Content]
    answer: Callable[[bytes], dict[str, Any]]

    def __init__(self, port: int):
        try:
            super().__init__((ADDRESS, port), Handler)
        except OverflowError:
            raise UserError(f"--port {port} is not allowed; it takes 0 to 65535") from None
        except OSError as error:
            reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"--port {port} cannot be had: {reason}; give another, or 0 for any that is free") from None

    def serve(self, pages: Mapping[str, Content], answer: Callable[[bytes], dict[str, Any]]) -> None:
        """Serves `pages`, by path, and answers a picture posted to ``/predict`` with what `answer` makes of it, as JSON; until
        another thread calls `shutdown`, or ^C.

        Several threads may call `answer` at once; the page shows the text of a `UserError` that it raises.
        """
        self.pages, self.answer = pages, answer
        self.serve_forever()

    def server_bind(self) -> None:
        """Without asking for this machine's name, which may take seconds where there is no network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback of a fault; a browser that has gone is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection. Whatever is refused is told as JSON, ``{"error": TEXT}``."""

    server: DemoServer
    protocol_version = "HTTP/1.1"  # a drawing asks many times a second, over one connection
    timeout = IDLE_S

    def do_GET(self) -> None:
        """One of the pages."""
        if self._is_refused():
            return
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND, f"there is no {self.path}")
        else:
            self._send(HTTPStatus.OK, *page)

    def do_POST(self) -> None:
        """A picture."""
        if self._is_refused():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/predict":
            self.send_error(HTTPStatus.NOT_FOUND, f"there is no {self.path} to post to")
        elif not (length.isascii() and length.isdecimal()) or len(length) > 19:
            self.send_error(HTTPStatus.LENGTH_REQUIRED, "a request needs a Content-Length")
        elif int(length) > MAX_BYTES:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the picture is larger than {MAX_BYTES >> 20} MiB")
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, picture: bytes) -> None:
        code, told = HTTPStatus.OK, dict[str, Any]()
        try:
            told = self.server.answer(picture)
        except UserError as error:
            code, told = HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        except Exception as error:  # a picture may hold anything, and a user's network raise anything
            code, told = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"it cannot be predicted: {in_one_line(error)}"}
        self._send_json(code, told)

    def _is_refused(self) -> bool:
        """Whether the request was refused, since it may come from a page of another site."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.lower().rpartition(":")[0] not in HOSTS and host.lower() not in HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, f"the host {host} is not allowed; open {self.server.url}")
        elif origin is not None and origin.lower() != f"http://{host.lower()}":
            self.send_error(HTTPStatus.FORBIDDEN, f"a page of {origin} is not allowed to ask; open {self.server.url}")
        else:
            return False
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error as JSON, after which the connection is closed: a body that was not read would be taken for a request."""
        self.close_connection = True
        self._send_json(code, {"error": message or HTTPStatus(code).phrase})

    def _send_json(self, code: int, value: dict[str, Any]) -> None:
        self._send(code, "application/json", json.dumps(value, allow_nan=False).encode())

    def _send(self, code: int, type: str, body: bytes) -> None:
        self.send_response_only(code)
        for name, text in {**HEADERS, "Content-Type": type, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed of a request."""
