"""A real server in a subprocess, for tests that speak HTTP to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`server launch ARGS` on a free port; ready when the `with` block begins, gone when it ends.

    On the CPU unless told otherwise, whose answers are the same in every batch; None leaves `--device` out.
    """

    def __init__(self, *args: str, env: dict[str, str] | None = None, device: str | None = "cpu") -> None:
        self.port = free_port()
        self.args = [*args, *([] if device is None else ["--device", device]), "--port", str(self.port)]
        self.env = {**os.environ, **(env or {})}
        self.log_path = Path(tempfile.mkstemp(prefix="srt-test-", suffix=".log")[1])
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def start(self) -> Self:
        """Spawn the process without waiting for it to become ready."""
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "srt.cli", "launch", *self.args],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.env,
            )  # fmt: skip
        return self

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Wait for `/ready`. Raises: AssertionError with the server's log if it dies or is late."""
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server exited with {self.process.returncode}:\n{self.log}"
            try:
                if self.get("/ready").status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log}")

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """Send `sig` and return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not stop within {STOP_TIMEOUT_S} s:\n{self.log}") from None

    def __enter__(self) -> Self:
        return self.start().wait_ready()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            self.log_path.unlink(missing_ok=True)

    # --- speaking to it ---------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None, timeout_s: float = 120.0) -> Answer:
        """One HTTP request; errors of status 4xx and 5xx are answers too."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def get(self, path: str) -> Answer:
        """GET `path`."""
        return self.request("GET", path)

    def post(self, path: str, body: Any = None) -> Answer:
        """POST `body` as JSON."""
        return self.request("POST", path, body)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric whose labels include `labels`; `name` without the `sglang:` prefix."""
        total, found = 0.0, False
        for line in self.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] != f"sglang:{name}":
                continue
            if all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
                total, found = total + float(value), True
        assert found, f"no metric {name} with {labels}"
        return total

    def children(self) -> dict[str, int]:
        """Process title -> pid of every process of this server but `launch` itself."""
        assert self.process is not None
        found: dict[str, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == self.process.pid:
                    title = (stat.parent / "cmdline").read_bytes().split(b"\0")[0].decode()
                    found[title] = int(stat.parent.name)
            except (OSError, IndexError):
                continue
        return found


class Answer:
    """Status, headers and body of a response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)
