"""A headless Chromium, driven through a pipe by its DevTools protocol: what tests of the page need, and no more."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import LONG, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

GONE = (
    "Inspected target navigated or closed",
    "Execution context was destroyed.",
    "Cannot find context with specified id",
)
"""What the browser answers where the page that was asked gave way to another one before it had answered."""


class PageGoneError(Exception):
    """A page that was left before it answered."""


class Browser:
    """One page in a browser; `errors` are what its console and its network said, `requests` what it asked for."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._left = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, address: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open an address and wait until its charts are drawn."""
        self.errors.clear()
        self.requests.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self.resize(width, height)
        self._call("Page.navigate", url=address)
        self.wait("document.documentElement?.dataset.drawn !== undefined")

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def wait(self, condition: str) -> None:
        """Wait until a condition in JavaScript holds, on this page or on one that takes its place."""

        def holds() -> bool:
            try:
                return bool(self(condition))
            except PageGoneError:
                return False

        until(holds, f"{condition} in the browser")

    def __call__(self, expression: str) -> Any:
        """Return what an expression in JavaScript gives."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press a key, as `ArrowRight`, 39."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def hover(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        printed = self._call("Page.printToPDF", preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(printed["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._write, content) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if answer.get("error", {}).get("message") in GONE:
                    raise PageGoneError(answer["error"]["message"])
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._read], [], [], LONG)[0], "the browser does not answer"
            more = os.read(self._read, 1 << 16)
            assert more, "the browser has gone"
            self._left += more
        content, _, self._left = self._left.partition(b"\0")
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(each.get("value", each)) for each in about["args"]))
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(about["exceptionDetails"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.errors.append(about["entry"]["text"])


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser that has no network, and end it."""
    assert CHROMIUM is not None
    to_read, write = os.pipe()
    read, to_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="tombola-browser-", ignore_cleanup_errors=True) as folder:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={folder}"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]

        def take_ends() -> None:
            for number, end in zip((3, 4), ends, strict=True):  # where the browser looks for them
                os.dup2(end, number)

        process = subprocess.Popen(
            [CHROMIUM, "--remote-debugging-pipe", *flags, "about:blank"],
            preexec_fn=take_ends,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": folder},
        )
        for end in ends:
            os.close(end)
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(write, read)
        finally:
            with contextlib.suppress(OSError):
                os.close(write)
            os.close(read)
            process.terminate()
            try:
                process.wait(LONG)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
