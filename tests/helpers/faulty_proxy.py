"""A proxy in front of a real S3 server that breaks some of the answers. Knows HTTP, not shards.

Requests pass as they are, signatures included. A schedule says what becomes of each; it runs in threads of the
test's process, and is reached from others.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PASSING = ("reset", "short", "slow_down", "trickle", "stall", "hang_up")


class Fault(NamedTuple):
    """What becomes of an answer.

    ok; reset, short: broken off after `value` bytes of the body, rudely or politely; trickle: a byte now and
    then after `value` bytes; stall: no answer; hang_up: the connection ends instead of an answer; slow_down:
    503; missing: 404; wall: nothing of the object beyond byte `value` ever comes.
    """

    kind: str = "ok"
    value: int = 0


OK = Fault()


def seeded(seed: int, share: float = 0.25, kinds: tuple[str, ...] = PASSING, longest: int = 300_000) -> Schedule:
    """Faults for about `share` of the requests; 503s come in bursts of up to three."""
    rng, burst = random.Random(seed), [0]

    def schedule(number: int, path: str) -> Fault:
        if burst[0]:
            burst[0] -= 1
            return Fault("slow_down")
        if rng.random() > share:
            return OK
        kind = rng.choice(kinds)
        if kind == "slow_down":
            burst[0] = rng.randrange(3)
        return Fault(kind, rng.randrange(longest))

    return schedule


Schedule = Callable[[int, str], Fault]


@dataclass
class FaultyProxy:
    """A running proxy. `always` holds faults by the end of a path and goes before the schedule.

    With `token`, requests signed with another session token are answered by ExpiredToken.
    """

    url: str
    upstream: str
    schedule: Schedule = lambda number, path: OK
    always: dict[str, Fault] = field(default_factory=dict)
    token: str | None = None
    requests: list[str] = field(default_factory=list)
    spent: list[Fault] = field(default_factory=list)
    refused_until: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Passes everything on, and forgets what was asked for."""
        self.schedule, self.always, self.token, self.refused_until = (lambda number, path: OK), {}, None, 0.0
        self.requests, self.spent = [], []

    def refuse(self, seconds: float) -> None:
        """Ends every connection before a byte is read, for a while."""
        self.refused_until = time.monotonic() + seconds

    def next_fault(self, path: str) -> Fault:
        with self.lock:
            self.requests.append(path)
            for end, fault in self.always.items():
                if path.endswith(end):
                    return fault
            fault = self.schedule(len(self.requests), path)
            if fault.kind != "ok":
                self.spent.append(fault)
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultyProxy

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        fault = self.state.next_fault(path) if self.command == "GET" else self.state.always.get(path, OK)
        token = self.state.token
        if token is not None and self.headers.get("X-Amz-Security-Token") != token:
            return self._error(400, "ExpiredToken")
        if fault.kind == "slow_down":
            return self._error(503, "SlowDown")
        if fault.kind == "missing":
            return self._error(404, "NoSuchKey")
        if fault.kind == "stall":
            self.state.ended.wait(20)
        if fault.kind in ("stall", "hang_up"):
            return self._hang_up(rudely=False)
        self._relay(fault)

    def _relay(self, fault: Fault) -> None:
        upstream = http.client.HTTPConnection(urlsplit(self.state.upstream).netloc, timeout=30)
        try:
            upstream.request(self.command, self.path, headers=dict(self.headers))
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        with suppress(OSError):  # the client may have had enough
            self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault.kind == "wall":
            match = re.match(r"bytes=(\d+)", self.headers.get("Range") or "bytes=0")
            assert match is not None
            fault = Fault("short", max(0, fault.value - int(match[1])))
        if fault.kind == "ok" or fault.value >= len(body):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.value])
        self.wfile.flush()
        if fault.kind == "trickle":
            for number in range(fault.value, len(body)):
                self.wfile.write(body[number : number + 1])
                if self.state.ended.wait(0.05):
                    break
        self._hang_up(rudely=fault.kind == "reset")

    def _error(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self, rudely: bool) -> None:
        self.close_connection = True
        with suppress(OSError):
            if rudely:  # with nothing to linger for, close sends a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    state: FaultyProxy

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return time.monotonic() >= self.state.refused_until

    def handle_error(self, *_: object) -> None:
        """Quiet: clients leave as they like."""


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy on a free port of 127.0.0.1."""
    server = _Server(("127.0.0.1", 0), _Handler, bind_and_activate=True)
    state = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}", upstream)
    server.state = state
    server.RequestHandlerClass = type("BoundHandler", (_Handler,), {"state": state})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
