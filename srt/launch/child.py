"""Entry of every child process: `python -m srt.launch.child ROLE RANK RUNDIR`.

It gives the process its title, makes it die with its parent, starts logging and the heartbeat, reads the plan and
hands over to the role. What escapes from there is said to `launch` as one `Fatal` before the process ends.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import msgspec
import setproctitle
import zmq

from srt import log
from srt.configs.plan import RuntimePlan
from srt.errors import SrtError
from srt.heartbeat import PID, Board, Heartbeat, process_name
from srt.launch import PLAN
from srt.launch.gpu import wake
from srt.messages import Fatal, Phase
from srt.orphans import die_with
from srt.wire import Outbox

ROLES: Final = {
    "api": "srt.api.process:run",
    "tokenizer": "srt.tokenizer.process:run",
    "scheduler": "srt.scheduler.process:run",
    "worker": "srt.worker.process:run",
}
"""Role -> `module:function`, called as `run(plan, rundir, rank, beat)`; the api's takes `secrets` too."""


def main(arguments: Sequence[str], roles: Mapping[str, str] = ROLES) -> int:
    """Run one role until it is asked to stop. Returns the exit status."""
    role, rank, rundir = arguments[0], int(arguments[1]), Path(arguments[2])
    name = process_name(role, rank)
    setproctitle.setproctitle(name)
    board = Board.open(rundir)
    _die_with(board.slot(process_name("launch"))[PID])
    heart = Heartbeat.attach(board, name)
    _obey_signals(heart)
    plan = msgspec.msgpack.decode((rundir / PLAN).read_bytes(), type=RuntimePlan)
    log.configure(name, plan.server.log_level, plan.server.log_format)
    if role == "worker" and plan.device.device == "cuda":
        wake(rank)
    context = zmq.Context()
    launch = Outbox(context, rundir, "launch")
    launch.send(Phase(role, rank, "interpreter", time.monotonic()))
    failure = _run(roles[role], role, rank, plan, rundir, heart, launch)
    if failure is not None:
        launch.send(Fatal(role, rank, failure))
    launch.close()
    context.term()  # waits until the last words are handed over
    return 0 if failure is None else 1


def _run(
    target: str, role: str, rank: int, plan: RuntimePlan, rundir: Path, heart: Heartbeat, launch: Outbox
) -> str | None:
    """Run the role to its end. Returns why it failed, None if it did not."""
    try:
        module, _, function = target.partition(":")
        run = _imported(module, function)
        launch.send(Phase(role, rank, "imports", time.monotonic()))
        if role == "api":
            run(plan, rundir, rank, heart, secrets=_take_secrets())
        else:
            run(plan, rundir, rank, heart)
    except SrtError as error:
        return str(error)
    except Exception as error:
        logging.getLogger(__name__).exception("a bug ends this process")
        return f"{type(error).__name__}: {error}"
    return None


def _imported(module: str, function: str) -> Callable[..., None]:
    """The role's function. What its modules made lives as long as the process and is kept from the garbage collector:
    looking through it takes a tenth of torch's import, and later a pause of 50 ms now and then."""
    gc.disable()
    try:
        run: Callable[..., None] = getattr(importlib.import_module(module), function)
    finally:
        gc.freeze()
        gc.enable()
    return run


def _take_secrets() -> object:
    """The API keys, which come by environment and leave it here."""
    from srt.api.auth import Secrets  # here: no other role has a use for it

    return Secrets(
        api_key=os.environ.pop("SRT_API_KEY", None),
        admin_api_key=os.environ.pop("SRT_ADMIN_API_KEY", None),
    )


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, and end it if that has happened already."""
    if not die_with(parent):
        sys.exit("the launching process is gone")


def _obey_signals(heart: Heartbeat) -> None:
    def stop(signum: int, frame: FrameType | None) -> None:
        heart.stop()

    faulthandler.enable()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: launch gets it too and stops everything in order


def leave(status: int) -> NoReturn:
    """End the process without tearing the interpreter down: all that matters has been closed by then."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
