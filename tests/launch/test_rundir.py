"""The private directory, the port and the entry of a child."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from srt.errors import StartupError
from srt.heartbeat import PID, Board
from srt.launch.rundir import make_rundir, private_directory, reserve_port, write_plan
from srt.wire import address
from tests.support.resolved import make_plan


def test_only_this_user_may_enter() -> None:
    rundir = make_rundir()
    assert rundir.stat().st_mode & 0o777 == 0o700
    rundir.rmdir()


def test_a_temporary_directory_with_a_long_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    rundir = make_rundir()
    assert len(address(rundir, "scheduler").removeprefix("ipc://")) <= 107
    assert list(deep.iterdir()) == []
    rundir.rmdir()


def test_the_directory_of_a_killed_server_goes_with_the_next_start_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = "from srt.launch.rundir import private_directory as p\nwith p() as path: print(path, flush=True); input()"
    servers = []
    for _ in range(2):
        server = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        assert server.stdout is not None
        servers.append((server, Path(server.stdout.readline().strip())))
    (killed, left), (living, held) = servers
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    newborn = tmp_path / "srt-newborn"
    newborn.mkdir()
    with private_directory() as mine:
        assert sorted(tmp_path.iterdir()) == sorted([held, mine, newborn])
    living.communicate("\n")
    assert list(tmp_path.iterdir()) == [newborn]


def test_port_0_becomes_a_free_one() -> None:
    with reserve_port("127.0.0.1", 0) as reserved:
        assert reserved.getsockname()[1] > 0


def test_a_reserved_port_can_be_listened_on_by_the_api_process() -> None:
    with reserve_port("127.0.0.1", 0) as reserved, socket.create_server(reserved.getsockname()) as listener:
        assert listener.getsockname() == reserved.getsockname()


def test_a_port_that_somebody_listens_on_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} of 127.0.0.1 is taken"):
            reserve_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1 cannot be used"):
        reserve_port("192.0.2.1", 30000)


def test_a_child_whose_parent_is_not_the_launcher_ends_at_once(tmp_path: Path) -> None:
    write_plan(tmp_path, make_plan())
    board = Board.create(tmp_path, ["srt:launch", "srt:scheduler"])
    board.slot("srt:launch")[PID] = os.getppid()
    command = [sys.executable, "-m", "srt.launch.child", "scheduler", "0", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "the launching process is gone\n"
