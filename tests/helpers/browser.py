"""A headless Chromium that opens a page and says what came of it: over a pipe, in the browser's DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_WITHIN_S = 60.0
# The protocol's ends are descriptors 3 and 4 of the browser, whatever they are here.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, end in zip((3, 4), ends):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def missing() -> str | None:
    """Why no browser can be started here; None when one can."""
    return None if _program() else f"no browser: none of {', '.join(_NAMES)} is on the PATH"


def _program() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass
class Browser:
    """One page of a browser. `requests` and `complaints` (console errors, refused loads) grow as it is used."""

    write_fd: int
    read_fd: int
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _buffer: bytes = b""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _session: str | None = None
    _loaded: bool = False

    def attach(self) -> None:
        """Make a page and listen to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Show a file in a window of `width` CSS pixels, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _WITHIN_S
        while not self._loaded:
            self._note(self._receive(deadline))

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; events that come before its answer are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _WITHIN_S
        while (answer := self._receive(deadline)).get("id") != number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _note(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(details["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(details["args"]))
            case "Log.entryAdded":
                self.complaints.append(details["entry"]["text"])

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self.read_fd], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.read_fd, 1 << 20) if ready else b""
            assert part, "the browser ended, or did not answer in time"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))


@contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `home`; it ends with the context."""
    program = _program()
    assert program is not None, missing()
    (commands_out, commands_in), (answers_out, answers_in) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _LAUNCH,
            str(commands_out),
            str(answers_in),
            program,
            *_FLAGS,
            f"--user-data-dir={home}",
        ],
        pass_fds=(commands_out, answers_in),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    try:
        page = Browser(commands_in, answers_out)
        page.attach()
        yield page
    finally:
        process.terminate()
        process.wait(timeout=_WITHIN_S)
        os.close(commands_in)
        os.close(answers_out)
