"""Chromium without a window, driven as a person would: by its DevTools protocol, over a pipe.

The protocol's methods: https://chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars", "disable-sync")
OFFLINE = ("disable-background-networking", "disable-component-update")


def chromium_command(profile: Path, *arguments: str) -> list[str]:
    """The command line of a Chromium that keeps to itself, with a profile folder of its own."""
    program = shutil.which("chromium")
    assert program, "this test needs chromium: apt-get install chromium"
    options = [f"--{name}" for name in ("headless", *QUIET, *OFFLINE)]
    return [program, *options, f"--user-data-dir={profile}", *arguments]


class Browser:
    """One page of a Chromium. `errors`: its exceptions since it was opened, failed requests, and what its policy forbade it."""

    def __init__(self, profile: Path):
        self.errors: list[str] = []
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._received = b""
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash"]  # sh may take numbers below 10 alone
        command += chromium_command(profile, "--remote-debugging-pipe", "about:blank")
        self._process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        (page,) = (one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "the browser has ended"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def open(self, url: str, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        """Opens a page in a window of this size, and waits until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.errors.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 30) -> None:
        """Until the expression is true in the page."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """A press, move or release of the left button, at a place in the window: `kind` is Pressed, Moved or Released."""
        held = {"button": "left", "buttons": int(kind != "Released"), "clickCount": int(kind != "Moved")}
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **held)

    def finger(self, kind: str, *points: tuple[float, float]) -> None:
        """A touch event: `kind` is Start, Move or End."""
        self.call("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=[{"x": x, "y": y} for x, y in points])

    def key(self, key: str, text: str = "", modifiers: int = 0) -> None:
        """A key pressed and let go; `modifiers`: 2 for Ctrl."""
        code = {"Tab": 9, "Enter": 13}.get(key, ord(key[0].upper()))
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose_file(self, selector: str, file: Path) -> None:
        """Chooses a file for an input element, as in its dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
