"""An HTTP server of byte strings that fails on command. It also passes for S3: path-style GETs, unsigned."""

from __future__ import annotations

import io
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[str, Any]


@dataclass
class FaultyServer:
    """`objects` by path; the first of `faults` is spent on each request, and `always` on all that follow.

    Faults: ("status", code), ("reset", bytes sent before), ("short", bytes sent before a polite end),
    ("slow", seconds), ("s3", (code, error name)), ("ok", None).
    """

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)
    faults: list[Fault] = field(default_factory=list)
    always: Fault = ("ok", None)
    ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    headers: list[Message] = field(default_factory=list, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> Fault:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always


class Handler(BaseHTTPRequestHandler):
    """Answers from `state`, which `serve` sets."""

    protocol_version = "HTTP/1.1"
    state: FaultyServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        state = self.state
        state.headers.append(self.headers)
        state.requests.append((self.path, self.headers.get("Range")))
        kind, value = state.next_fault()
        if kind == "slow":
            time.sleep(value)
        content = state.objects.get(self.path.split("?")[0])
        if kind in ("status", "s3"):
            self._error(value)
        elif content is None:
            self._error((404, "NoSuchKey"))
        else:
            self._send(content, kind, value)

    def _error(self, value: int | tuple[int, str]) -> None:
        status, name = value if isinstance(value, tuple) else (value, "SlowDown")
        body = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>told to</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, content: bytes, kind: str, value: Any) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        body = content
        if match and self.state.ranges:
            start = int(match[1])
            if start >= len(content):
                return self._error((416, "InvalidRange"))
            body = content[start : int(match[2]) + 1 if match[2] else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind in ("reset", "short"):
            self.wfile.write(body[:value])
            self._break(kind)
        else:
            self.wfile.write(body)

    def _break(self, kind: str) -> None:
        self.wfile.flush()
        if kind == "reset":  # with nothing to linger for, close sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True
        self.wfile = io.BytesIO()  # type: ignore[assignment]  # the base class flushes it


class Server(ThreadingHTTPServer):
    """Says nothing of clients that leave."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve() -> Iterator[FaultyServer]:
    """A running server on a free port of 127.0.0.1."""
    state = FaultyServer()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
