"""A headless Chromium that a test drives: the DevTools protocol over two pipes, with no package for it."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """The program, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page in a headless browser that reaches this machine alone.

    Args:
        profile: an empty folder for it. microphone: a WAV file that its microphone hears; None: beeps.
        flags: more of its options.

    Attributes:
        requests: the addresses of all that the page asked for. problems: what its console complained of.
    """

    def __init__(self, profile: Path, microphone: Path | None = None, flags: tuple[str, ...] = ()):
        # What it reads are our commands on descriptor 3, and it answers on 4.
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high_in, high_out = (fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs_in, theirs_out))

        def connect() -> None:
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        heard = () if microphone is None else (f"--use-file-for-fake-audio-capture={microphone}",)
        command = [
            find_chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--use-fake-device-for-media-stream",
            "--use-fake-ui-for-media-stream",
            f"--user-data-dir={profile}",
            *heard,
            *flags,
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        for each in (theirs_in, theirs_out, high_in, high_out):
            os.close(each)
        self._rest, self._number = b"", 0
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._session = None
        found = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in found if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, seconds: float = 120, **parameters: Any) -> dict[str, Any]:
        """Asks the browser for something, and waits for the answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while True:
            answer = self._next(end - time.monotonic())
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], max(seconds, 0))[0], "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        inside = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(inside["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(inside["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and inside["entry"]["level"] == "error":
            self.problems.append(f"{inside['entry']['text']} {inside['entry'].get('url', '')}")
        return message

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 120) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} stays {value!r}; the page says {self.text()!r}"
            time.sleep(0.1)
        return value

    def text(self) -> str:
        """What is to be read on the page."""
        return self.evaluate("document.body.innerText")

    def choose_file(self, selector: str, file: Path) -> None:
        """Gives a file to an input of the page, as its dialog would."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file.resolve())], objectId=found["result"]["objectId"])

    def screenshot(self, path: Path, width: int, height: int, scale: float = 1, dark: bool = False) -> None:
        """Writes what is seen as PNG."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
