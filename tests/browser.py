"""A headless Chromium driven over a pipe: no package, no port. One process serves the tests of a module."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0


def found() -> str | None:
    """The browser of this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `messages` are what it wrote to the console or raised, `requests` the addresses it asked for."""

    def __init__(self, folder: Path) -> None:
        there, back = os.pipe(), os.pipe()
        reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (there[0], back[1]))
        flags = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-extensions --disable-background-networking "
            f"--window-size=1280,900 --disable-dev-shm-usage --remote-debugging-pipe --user-data-dir={folder}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {found()} {flags} about:blank 3<&{reads} 4>&{writes}"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (there[0], back[1], reads, writes):
            os.close(end)
        self._to, self._from, self._rest, self._count = there[1], back[0], b"", 0
        self._session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer."""
        self._count += 1
        words = {"id": self._count, "method": method, "params": params}
        os.write(self._to, json.dumps(words | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._read(until)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def open(self, path: Path, hash: str = "") -> None:
        """Load a file from the beginning and wait until its script has run."""
        self.ask("Page.navigate", url="about:blank")
        self.messages.clear()
        self.requests.clear()
        self.ask("Page.navigate", url=f"{path.as_uri()}#{hash}")
        until = time.monotonic() + PATIENCE
        while self.js("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < until, "the page never came to an end"
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key as from a keyboard."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            words = {"text": text} if text and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **words)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            assert part, f"the browser is silent (exit code {self.process.poll()})"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._heard(message.get("method", ""), message.get("params", {}))
        return message

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"].partition("#")[0])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.messages.append(json.dumps(params))
