"""A web server on the loopback that knows ranges, ETags and If-Match, and fails where a test wants it to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer:
    """Serves the files below a folder until the block ends.

    asked: (method, path, Range header) of each request. answered: the status of each answer of a server with ranges.
    fault: called with what is asked before each answer; what it returns is a status to answer with, or a negative
    number: minus how many bytes to send before the connection breaks.
    """

    def __init__(self, root: Path, *, ranges: bool = True) -> None:
        self.root, self.asked, self.answered = root, [], []
        self.fault: Callable[[str, str, str | None], int | None] = lambda method, path, part: None
        handler = _Ranges if ranges else _Plain
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Plain(SimpleHTTPRequestHandler):
    """Python's own: Content-Length and Last-Modified, whole files alone."""

    owner: WebServer

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments, directory=str(self.owner.root))

    def do_GET(self) -> None:
        self.owner.asked.append(("GET", self.path, self.headers.get("Range")))
        fault = self.owner.fault("GET", self.path, self.headers.get("Range"))
        if fault is None:
            super().do_GET()
            return
        content = (self.owner.root / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:-fault])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


class _Ranges(BaseHTTPRequestHandler):
    owner: WebServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        path, part = self.path.partition("?")[0], self.headers.get("Range")
        self.owner.asked.append((method, path, part))
        fault = self.owner.fault(method, path, part)
        file = self.owner.root / path.lstrip("/")
        if fault is not None and fault > 0 or not file.is_file():
            self._head(fault or 404, 0)
            return
        content = file.read_bytes()
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Match", tag) != tag:
            self._head(412, 0)
            return
        status, extra, total = 200, {}, len(content)
        if part is not None:
            first = int(part.removeprefix("bytes=").partition("-")[0])
            status, content = 206, content[first:]
            extra = {"Content-Range": f"bytes {first}-{total - 1}/{total}"}
        self._head(status, len(content), ETag=tag, **extra)
        if method == "GET":
            self.wfile.write(content if fault is None else content[:-fault])
            self.close_connection = fault is not None

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.owner.answered.append(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""
