"""The real child entry with roles that do nothing but what the test says: `STAND_IN=tokenizer=hang,worker=bug`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import zmq

from srt.api.auth import Secrets
from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.heartbeat import Heartbeat
from srt.launch.child import leave, main
from srt.messages import Progress, Ready, ServerReady, ToApi
from srt.wire import Inbox, Outbox

ROLES = {role: f"tests.launch.stand_in:{role}" for role in ("api", "tokenizer", "scheduler", "worker")}


def write(text: str) -> None:
    """Add a line to the journal of the test."""
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(text + "\n")


def play(role: str, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Do what the test says for this role: serve, unless it says otherwise."""
    wanted = dict(part.split("=") for part in os.environ.get("STAND_IN", "").split(",") if part)
    act = wanted.get(role, "serve")
    if act == "refuse":
        raise StartupError(f"rank {rank} found 3 of 4 shards")
    if act == "bug":
        raise ValueError("not what I expected")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    launch = Outbox(context, rundir, "launch")
    if role == "worker":
        launch.send(Progress(rank, 50, 100))
    if act != "slow":
        launch.send(Ready(role, rank, {"pid": str(os.getpid())}))
    if act == "return":
        launch.close()
        context.term()
        return
    if act == "stuck":
        beat.step_begins(12)
    while not beat.stopping or act == "hang":
        time.sleep(0.02)
    write(f"{role}{rank} stops")
    launch.close()
    context.term()


def api(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat, *, secrets: Secrets) -> None:
    """Journals the keys it was given, and that it was told that the server is ready."""
    write(f"api keys {secrets.api_key} {secrets.admin_api_key} environment {'SRT_API_KEY' in os.environ}")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox: Inbox[ServerReady] = Inbox(context, rundir, "api", ToApi)
    play("api", rundir, rank, beat)
    inbox.wait(1000)
    write(f"api heard {inbox.drain()}")


def tokenizer(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Journals what keys it can see: none."""
    write(f"tokenizer environment {[name for name in os.environ if name.startswith('SRT_')]}")
    play("tokenizer", rundir, rank, beat)


def scheduler(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Nothing special."""
    play("scheduler", rundir, rank, beat)


def worker(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Nothing special."""
    play("worker", rundir, rank, beat)


if __name__ == "__main__":
    leave(main(sys.argv[1:], ROLES))
