"""Starting, health, draining, dying."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Answer, Server

ROLES = ["srt:api", "srt:tokenizer", "srt:scheduler", "srt:worker[0]"]


def launch(nano: Path, *options: str) -> Server:
    """A server on the nano checkpoint, not started yet."""
    return Server("--model-path", str(nano), "--dtype", "float32", *options)


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def in_background(server: Server, new_tokens: int) -> tuple[threading.Thread, list[Answer]]:
    """A long request in a thread; its answer lands in the list, if there is one."""
    answers: list[Answer] = []
    params: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": [5, 6, 7], "sampling_params": params}

    def ask() -> None:
        with contextlib.suppress(OSError):  # a server that dies closes the connection
            answers.append(server.post("/generate", body))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def wait_for_status(server: Server, path: str, status: int, within_s: float) -> float:
    """Seconds until `path` answers `status`; fails after `within_s`."""
    begun = time.monotonic()
    while time.monotonic() - begun < within_s:
        if server.get(path).status == status:
            return time.monotonic() - begun
        time.sleep(0.1)
    raise AssertionError(f"{path} did not answer {status} within {within_s} s: {server.get(path).text}")


def test_every_role_runs_in_a_process_of_its_own_and_one_listener_serves_all(server: Server) -> None:
    children = server.children()
    assert sorted(children) == sorted(ROLES)
    inodes: set[str] = set()
    assert server.process is not None
    for pid in [server.process.pid, *children.values()]:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.add(int(fields[1].rsplit(":", 1)[1], 16))
    assert listening == {server.port}


@pytest.mark.parametrize("role", ROLES)
def test_the_death_of_any_process_ends_the_server_within_5_s(role: str, nano: Path) -> None:
    with launch(nano) as server:
        children = server.children()
        thread, _ = in_background(server, 2000)
        time.sleep(0.3)
        begun = time.monotonic()
        os.kill(children[role], signal.SIGKILL)
        assert server.process is not None
        status = server.process.wait(timeout=5)
        assert status != 0
        assert time.monotonic() - begun < 5
        time.sleep(0.2)
        assert not [name for name, pid in children.items() if alive(pid)]
        cause = [line for line in server.log.splitlines() if role in line and "SIGKILL" in line]
        assert cause, server.log
        thread.join(timeout=5)


def test_sigterm_lets_running_requests_finish_and_exits_0(nano: Path) -> None:
    with launch(nano) as server:
        thread, answers = in_background(server, 600)
        time.sleep(0.5)
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        if server.process.poll() is None:
            try:
                late = server.post("/generate", {"text": "too late"})
                assert late.status == 503
            except OSError:
                pass
        assert server.process.wait(timeout=30) == 0
        thread.join(timeout=5)
        assert answers[0].status == 200
        assert len(answers[0].json["output_ids"]) == 600


def test_killing_the_launcher_leaves_no_orphan(nano: Path) -> None:
    with launch(nano) as server:
        children = server.children()
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(alive(pid) for pid in children.values()):
            time.sleep(0.05)
        assert not [name for name, pid in children.items() if alive(pid)]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("role", ["srt:tokenizer", "srt:scheduler", "srt:worker[0]"])
def test_a_stopped_process_turns_health_503_and_its_return_turns_it_200(role: str, busy: bool, server: Server) -> None:
    thread = None
    if busy:
        thread, _ = in_background(server, 400)
        time.sleep(0.2)
    pid = server.children()[role]
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for_status(server, "/health", 503, within_s=5)
        assert role in server.get("/health").text
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for_status(server, "/health", 200, within_s=5)
    if thread is not None:
        thread.join(timeout=60)


def test_a_long_prefill_stays_healthy(server: Server) -> None:
    body = {"input_ids": [9] * 8000, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    thread = threading.Thread(target=lambda: server.post("/generate", body))
    thread.start()
    while thread.is_alive():
        assert server.get("/health").status == 200
        time.sleep(0.05)


def test_a_taken_port_is_reported_in_one_sentence(server: Server, nano: Path) -> None:
    second = launch(nano)
    second.args[-1] = str(server.port)
    second.start()
    assert second.process is not None
    assert second.process.wait(timeout=30) != 0
    assert str(server.port) in second.log
    assert "Traceback" not in second.log


def test_a_directory_without_a_checkpoint_is_reported_in_one_sentence(tmp_path: Path) -> None:
    server = Server("--model-path", str(tmp_path / "nothing")).start()
    assert server.process is not None
    assert server.process.wait(timeout=30) != 0
    assert "nothing" in server.log
    assert "Traceback" not in server.log
