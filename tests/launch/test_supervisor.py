"""The supervisor with the real child entry and roles that do what the test says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

import psutil
import pytest

ROLES = ["srt:api", "srt:tokenizer", "srt:scheduler", "srt:worker[0]", "srt:worker[1]"]


class Supervised:
    """A supervisor with two workers."""

    def __init__(self, folder: Path, *options: str, act: str = "") -> None:
        self.journal_path = folder / "journal"
        self.journal_path.touch()
        self.log_path = folder / "log"
        environment = {**os.environ, "STAND_IN": act, "JOURNAL": str(self.journal_path)}
        command = [sys.executable, "-m", "tests.launch.supervised", "--tp-size", "2", *options]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        self.rundir = Path(self.line())

    def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def wait_ready(self) -> Self:
        """Until every role is ready."""
        assert self.line() == "ready", self.log
        return self

    def children(self) -> dict[str, psutil.Process]:
        """Title -> process."""
        return {child.cmdline()[0]: child for child in psutil.Process(self.process.pid).children()}

    def wait(self, timeout_s: float = 10) -> int:
        """The exit status."""
        return self.process.wait(timeout_s)

    @property
    def log(self) -> str:
        """What it and its children wrote to stderr."""
        return self.log_path.read_text()

    @property
    def journal(self) -> list[str]:
        """What the stand-ins wrote down."""
        return self.journal_path.read_text().splitlines()

    def close(self) -> None:
        """Leave nothing behind, whatever the test found."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                child.kill()
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Starter(Protocol):
    """Makes servers."""

    def __call__(self, *options: str, act: str = "") -> Supervised:
        """Start one; `act` says which role does what."""


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Starter]:
    """Servers that the test need not clean up behind."""
    made: list[Supervised] = []

    def start(*options: str, act: str = "") -> Supervised:
        made.append(Supervised(tmp_path, *options, act=act))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def server(starting: Starter) -> Supervised:
    """A server that is ready."""
    return starting().wait_ready()


def gone(children: dict[str, psutil.Process]) -> bool:
    """Whether no process is left."""
    return not psutil.wait_procs(list(children.values()), timeout=3)[1]


def cause(server: Supervised, name: str) -> str:
    """The line of the log that tells why the server stopped."""
    lines = [line for line in server.log.splitlines() if "the server stops" in line]
    assert len(lines) == 1, server.log
    assert name in lines[0]
    return lines[0]


def test_each_role_has_a_process_with_its_title(server: Supervised) -> None:
    assert sorted(server.children()) == sorted(ROLES)


def test_the_directory_of_a_server_is_private(server: Supervised) -> None:
    assert server.rundir.stat().st_mode & 0o777 == 0o700


def test_sigterm_stops_role_after_role_and_exits_0(server: Supervised) -> None:
    children = server.children()
    server.process.terminate()
    assert server.wait() == 0
    stops = [line.split()[0] for line in server.journal if line.endswith("stops")]
    assert stops[:3] == ["api0", "tokenizer0", "scheduler0"]
    assert sorted(stops[3:]) == ["worker0", "worker1"]
    assert gone(children)
    assert not server.rundir.exists()


def test_the_api_is_told_that_all_are_ready(server: Supervised) -> None:
    server.process.terminate()
    server.wait()
    (heard,) = (line for line in server.journal if line.startswith("api heard"))
    for phase in ("plan", "interpreter", "imports", "ready"):
        assert f"'{phase}': " in heard
    assert heard.startswith("api heard [ServerReady(phases={'plan': ")


def test_only_the_api_gets_the_keys_and_they_are_nowhere_else(server: Supervised) -> None:
    assert b"sesame" not in (server.rundir / "plan.msgpack").read_bytes()
    assert not [child for child in server.children().values() if "sesame" in " ".join(child.cmdline())]
    assert "api keys open sesame root sesame environment False" in server.journal
    assert "tokenizer environment []" in server.journal
    server.process.terminate()
    server.wait()
    assert "sesame" not in server.log


@pytest.mark.parametrize("name", ROLES)
def test_a_killed_process_ends_the_server_within_5_s_and_is_named(name: str, server: Supervised) -> None:
    children = server.children()
    begun = time.monotonic()
    children[name].kill()
    assert server.wait() == 1
    assert time.monotonic() - begun < 5
    assert f"(pid {children[name].pid}) was killed by SIGKILL" in cause(server, name)
    assert gone(children)
    assert not server.rundir.exists()


def test_a_process_that_returns_unasked_ends_the_server(starting: Starter) -> None:
    server = starting(act="scheduler=return")
    assert server.wait() == 1
    assert "ended with status 0" in cause(server, "srt:scheduler")


def test_a_role_that_cannot_start_ends_the_server_with_its_own_sentence(starting: Starter) -> None:
    server = starting(act="worker=refuse")
    assert server.wait() == 1
    assert "failed: rank" in cause(server, "srt:worker")
    assert "found 3 of 4 shards" in cause(server, "srt:worker")
    assert "Traceback" not in server.log
    assert not server.rundir.exists()


def test_a_bug_ends_the_server_and_leaves_its_traceback_in_the_log(starting: Starter) -> None:
    server = starting(act="tokenizer=bug")
    assert server.wait() == 1
    assert "failed: ValueError: not what I expected" in cause(server, "srt:tokenizer")
    assert "Traceback" in server.log


def test_children_die_with_a_killed_launcher(server: Supervised) -> None:
    children = server.children()
    server.process.kill()
    server.wait()
    assert gone(children)


def test_a_second_signal_ends_everything_at_once(starting: Starter) -> None:
    server = starting(act="api=hang").wait_ready()
    children = server.children()
    server.process.terminate()
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.wait(3) == 128 + signal.SIGINT
    assert gone(children)
    assert not server.rundir.exists()


def test_a_process_that_does_not_stop_is_killed_after_its_deadline(starting: Starter) -> None:
    server = starting("--drain-timeout", "0", act="tokenizer=hang").wait_ready()
    children = server.children()
    server.process.terminate()
    assert server.wait(30) == 1
    assert "did not stop within 5 s" in cause(server, "srt:tokenizer")
    assert gone(children)


def test_a_signal_while_starting_ends_the_server_in_order(starting: Starter) -> None:
    server = starting(act="worker=slow")
    while len(server.children()) < len(ROLES):
        time.sleep(0.02)
    server.process.send_signal(signal.SIGINT)
    assert server.wait(3) == 0
    assert not server.rundir.exists()


def test_a_process_that_is_too_long_in_one_step_ends_the_server(starting: Starter) -> None:
    server = starting("--watchdog-timeout", "4", act="worker=stuck").wait_ready()
    assert server.wait(30) == 1
    assert "has been in step 12 for" in cause(server, "srt:worker[")


def test_a_silent_process_ends_the_server_after_the_watchdogs_time(starting: Starter) -> None:
    server = starting("--watchdog-timeout", "4").wait_ready()
    children = server.children()
    children["srt:scheduler"].suspend()
    assert server.wait(30) == 1
    assert "no sign of life" in cause(server, "srt:scheduler")
    assert gone(children)
