"""Chromium, driven over its DevTools protocol: what a page shows, asks for and complains of.

As a command it takes pictures: `python tests/browser.py PAGE FOLDER` at three widths, light and
dark.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 820, 1280)
_TIMEOUT_S = 60


class Page:
    """One tab. It notes every request, and every complaint on the console."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer of the browser; what happens meanwhile is noted."""
        self._number += 1
        number = self._number
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := self._receive()).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return dict(message["result"])

    def open(self, url: str, width: int = 1280, dark: bool = False) -> None:
        """Loads the page, all its pictures included."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._receive()
        self.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => 0)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, expression: str, most_s: float = 90) -> None:
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + most_s
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, (expression, self.text()[-3000:])
            time.sleep(0.2)

    def text(self) -> str:
        """What the page shows."""
        return str(self.evaluate("document.body.innerText"))

    def click(self, text: str, kind: str = "button") -> None:
        """Clicks the last element of a kind that shows just this text, once it is there."""
        shows = f"e => e.innerText.trim() == {json.dumps(text)}"
        found = f"[...document.querySelectorAll('{kind}')].filter({shows})"
        self.wait_for(f"{found}.length")
        self.evaluate(f"{found}.at(-1).click()")

    def missing_pictures(self) -> list[str]:
        """The alternative texts of the pictures that are not there."""
        missing = "[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)"
        return list(self.evaluate(missing))

    def overflow_px(self) -> int:
        """How much wider the page is than the window, so that all of it must be scrolled."""
        return int(self.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, or of what the window shows of it."""
        result = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(
            {"clip": {"x": 0, "y": 0, "scale": 1, "width": self.evaluate("innerWidth"),
                      "height": self.evaluate("document.documentElement.scrollHeight")}}
            if whole else {}
        ))  # fmt: skip
        path.write_bytes(base64.b64decode(result["data"]))

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(_TIMEOUT_S))
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Page.loadEventFired":
                self._loaded = True
        return message


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser of its own, which is gone afterwards."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr
            port = next(
                found[1]
                for line in process.stderr
                if (found := re.search(r"listening on ws://127\.0\.0\.1:(\d+)/", line))
            )
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with connect(address, max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    page_file, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as page:
        for width in WIDTHS:
            for dark in (False, True):
                page.open(page_file.resolve().as_uri(), width, dark)
                name = f"{page_file.stem}-{width}-{'dark' if dark else 'light'}.png"
                page.picture(folder / name)
                print(folder / name, page.overflow_px(), page.complaints, page.missing_pictures())
