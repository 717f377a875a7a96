"""Headless Chromium, driven through the DevTools protocol over a pipe: nothing but the standard library."""

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
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--no-first-run", "--disable-extensions", "--disable-background-networking", "--mute-audio",
         "--force-color-profile=srgb", "--remote-debugging-pipe"]  # fmt: skip


class Browser:
    """One browser with a profile of its own, which is gone afterwards. A context manager; `page` opens a tab."""

    def __init__(self, program: str | None = None) -> None:
        found = program or next((path for name in NAMES if (path := shutil.which(name))), None)
        if found is None:
            raise SystemExit("no Chromium here; on Debian: apt-get install chromium")
        self.profile = tempfile.mkdtemp(prefix="shrew-pages-")
        theirs, self._write = os.pipe()
        self._read, ours = os.pipe()
        # the browser reads commands from descriptor 3 and writes answers to 4
        script = f'exec "$0" "$@" 3<&{theirs} 4>&{ours}'
        command = ["bash", "-c", script, found, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(theirs, ours), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self._buffer, self._next = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method: str, tab: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that come meanwhile are kept."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params} | ({"sessionId": tab} if tab else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(120)
            if answer is None:
                raise RuntimeError(f"{method}: the browser does not answer")
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def page(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> "Page":
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.look(width, height, dark)
        page.open(url)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, tab: str) -> None:
        self.browser, self.tab = browser, tab

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.tab, **params)

    def look(self, width: int, height: int, dark: bool) -> None:
        """The size of the window (phones below 600 pixels) and the system's colours."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)  # fmt: skip
        self.send("Emulation.setEmulatedMedia", media="",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])  # fmt: skip

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def eval(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
                          userGesture=True)  # fmt: skip
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.eval(f"Boolean({condition})"):
                    return
            except RuntimeError as error:
                if "context" not in str(error):  # the page is being replaced
                    raise
            time.sleep(0.05)
        raise TimeoutError(f"not true within {seconds:g} s: {condition}")

    def type(self, text: str) -> None:
        """What a keyboard would write where the focus is."""
        self.send("Input.insertText", text=text)

    def key(self, name: str, modifiers: int = 0) -> None:
        """Press a key: Enter, Escape, Tab; modifiers 2: Ctrl, 8: Shift."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        text = {"text": "\r"} if name == "Enter" and modifiers in (0, 8) else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name],
                      modifiers=modifiers, **(text if kind == "keyDown" else {}))  # fmt: skip

    def click(self, selector: str) -> None:
        at = self.eval(f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                       "return [r.x + r.width / 2, r.y + r.height / 2]; })()")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def text(self, selector: str) -> str:
        return str(self.eval(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def offline(self, cut: bool) -> None:
        """Cut the network, or give it back."""
        self.send("Network.emulateNetworkConditions", offline=cut, latency=0, downloadThroughput=-1,
                  uploadThroughput=-1)  # fmt: skip

    def picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What the console and the browser's log hold against the page: errors, and what its policy refused."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.tab:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found
