"""A headless Chromium, driven through a pipe: how a reader's browser shows a page. Standard
library only.

The DevTools protocol is JSON with a NUL after each message; Chromium reads it from descriptor 3 and
writes to 4: no port is open.
"""

# Own code instead of Playwright: its package holds a Node.js runtime, through which each call goes, and is made for browsers that
# it downloads itself. What is needed here is to open a page of a stated size and theme, evaluate JavaScript, and take a picture,
# with the Chromium that the machine has.

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--force-device-scale-factor=1",
    "--font-render-hinting=none",
)


class BrowserError(Exception):
    """Chromium is absent or failed; the message says which."""


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in one browser with an empty profile. `events` holds everything that it reported."""

    def __init__(self, timeout_s: float = 60) -> None:
        """Raises BrowserError."""
        path = find()
        if path is None:
            raise BrowserError("no Chromium was found; install it: apt-get install chromium")
        self._deadline_s = timeout_s
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        redirected = f'exec "$0" "$@" 3<&{to_child} 4>&{from_child}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, path, *FLAGS, f"--user-data-dir={self._profile.name}"],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result. Raises BrowserError for an error and after the
        timeout.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self._deadline_s
        while (answer := self._receive(until)).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]  # type: ignore[no-any-return]

    def open(
        self,
        page: Path | str,
        width: int,
        height: int,
        *,
        dark: bool = False,
        scale: int = 1,
        settle_s: float = 0.3,
    ) -> None:
        """Loads a file, or a page by its address, at this size in CSS pixels, and waits until it is
        loaded and for a moment more. Raises BrowserError.
        """
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self.show_theme(dark=dark)
        self.events.clear()
        url = page if isinstance(page, str) else page.resolve().as_uri()
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{page}: Chromium cannot open it ({answer['errorText']})")
        until = time.monotonic() + self._deadline_s
        # another part of the page that is open loads nothing, and gets no loader
        loads = "loaderId" in answer
        while loads and not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(until))
        quiet = time.monotonic() + settle_s
        while (left := quiet - time.monotonic()) > 0 and select.select([self._in], [], [], left)[0]:
            self.events.append(self._receive(until))

    def show_theme(self, *, dark: bool) -> None:
        """What the page's `prefers-color-scheme` matches, from now on."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(f"{expression}: {result['exceptionDetails'].get('text')}")
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Waits until a JavaScript expression is true: for a page that draws itself. Raises
        BrowserError after the timeout, with what the page says instead.
        """
        until = time.monotonic() + self._deadline_s
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > until:
                text = self.evaluate("document.body.innerText")
                raise BrowserError(
                    f"not true after {self._deadline_s:g} s: {condition}; the page says: {text[:2000]}"
                )
            time.sleep(0.2)

    def picture(self, *, whole: bool = False) -> bytes:
        """The visible part of the page, or all of it, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and problems that the browser logged
        since the page was opened.
        """
        found = []
        for event in self.events:
            content = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(content["exceptionDetails"].get("text")))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(" ".join(str(argument.get("value")) for argument in content["args"]))
            elif event["method"] == "Log.entryAdded" and content["entry"]["level"] in (
                "error",
                "warning",
            ):
                found.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for, itself included, granted or not; `data:` is no
        request.
        """
        asked = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith("data:")]

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise BrowserError(f"Chromium did not answer within {self._deadline_s:g} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise BrowserError(
                    f"Chromium ended with status {self._process.wait()} before it answered"
                )
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        os.close(self._out)  # Chromium ends when its pipe does
        os.close(self._in)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def screenshot(
    page: Path, width: int, height: int, *, dark: bool = False, whole: bool = False
) -> bytes:
    """The head of a page, or all of it, as PNG. Raises BrowserError."""
    with Browser() as browser:
        browser.open(page, width, height, dark=dark)
        return browser.picture(whole=whole)
