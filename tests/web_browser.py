"""A headless Chromium, driven by the W3C WebDriver protocol that its chromedriver speaks.

Enters: URLs.  Leaves: what scripts in their pages answer, and what the browser's console says.
Promises: its processes end with the `with` block.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
_BINARIES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, page: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a URL in a window of this many CSS pixels, to a person who prefers light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        preference = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [preference]})
        _post(f"{self._session}/url", {"url": page})

    def run(self, script: str) -> Any:
        """What the body of a function returns inside the page."""
        return _post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call: scripts, refused requests, broken markup."""
        entries = _post(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def picture(self) -> bytes:
        """PNG of the whole window."""
        return base64.b64decode(self._devtools("Page.captureScreenshot", {"format": "png"})["data"])

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return _post(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextlib.contextmanager
def headless_browser() -> Iterator[Browser]:
    """Raises FileNotFoundError where there is no browser or no driver."""
    binary = next((found for name in _BINARIES if (found := shutil.which(name))), None)
    if binary is None or shutil.which("chromedriver") is None:
        raise FileNotFoundError("this needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        options = {"binary": binary, "args": _FLAGS}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        base = f"http://127.0.0.1:{port}/session"
        session = f"{base}/{_post(base, {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        try:
            yield Browser(session)
        finally:
            with urlopen(Request(session, method="DELETE"), timeout=60):
                pass
    finally:
        driver.terminate()
        driver.wait(60)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
