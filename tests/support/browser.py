"""A real browser without a window, spoken to in its own protocol (DevTools) over two pipes: nothing else is needed.

with Browser() as browser:
    page = browser.open("http://127.0.0.1:8000/")
    page.run("document.title")
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --mute-audio
--remote-debugging-pipe --font-render-hinting=none""".split()
_SECONDS = 60.0  # that anything may take

KEYS = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
"""name of a key that writes nothing -> its code"""


def find_browser() -> str | None:
    """The path of a Chromium; None: there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A process of it."""

    def __init__(self) -> None:
        path = find_browser()
        assert path is not None
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        moves = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        quiet = [(os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
        arguments = [path, *_FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"]
        environment = {**os.environ, "HOME": self._folder.name}
        self.pid = os.posix_spawn(path, arguments, environment, file_actions=[*moves, *quiet])
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._in, False)
        self._held = b""
        self._sent = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
        finally:
            os.waitpid(self.pid, 0)
            os.close(self._in)
            os.close(self._out)
            self._folder.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._sent += 1
        number = self._sent
        message = {"id": number, "method": method, "params": parameters}
        os.write(
            self._out, json.dumps(message if session is None else {**message, "sessionId": session}).encode() + b"\0"
        )
        while True:
            found = self._receive()
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._held:
            assert time.monotonic() < end, "the browser says nothing"
            try:
                more = os.read(self._in, 1 << 20)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            assert more, "the browser has ended"
            self._held += more
        line, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False, phone: bool = False) -> Page:
        """Open a page, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.look(width=width, height=height, dark=dark, phone=phone)
        page.call("Page.navigate", url=url)
        page.until("document.readyState === 'complete'")
        return page


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def look(self, *, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Change its size and the colours that its user likes."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = _SECONDS) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, f"it did not become so: {expression}; {self.text()}"
            time.sleep(0.02)

    def text(self, selector: str = "body") -> str:
        """The text that an element shows."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText"))

    def texts(self, selector: str) -> list[str]:
        """The texts that some elements show."""
        found = self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.innerText)")
        return [str(text) for text in found]

    def click(self, words: str, within: str = "body") -> None:
        """Click the last button of that name, as a mouse does."""
        find = (
            f"[...document.querySelectorAll({json.dumps(f'{within} button')})]"
            f".filter((e) => e.innerText === {json.dumps(words)} && e.offsetParent).at(-1)"
        )
        self.until(find)
        box = self.run(
            f"(() => {{ const e = {find}; e.scrollIntoView({{block: 'nearest'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.mouse(*box, press=True)

    def mouse(self, x: float, y: float, *, press: bool = False) -> None:
        """Move the mouse to a place, and press its button there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str, number: int = 0) -> None:
        """Move the mouse over an element."""
        box = self.run(
            f"(() => {{ const r = document.querySelectorAll({json.dumps(selector)})[{number}].getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.mouse(*box)

    def write(self, words: str) -> None:
        """Write where the focus is."""
        self.call("Input.insertText", text=words)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key of `KEYS`."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        writes = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **writes)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def focus(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def picture(self, path: Path) -> None:
        """Write what is seen, PNG."""
        path.write_bytes(b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def said(self, method: str, of: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """What was in the events of some kind."""
        self.run("0")  # those that are on their way
        events = self._browser.events
        return [of(e["params"]) for e in events if e.get("method") == method and e.get("sessionId") == self._session]

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
