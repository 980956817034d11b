"""The api and the tokenizer as processes of their own above a fake scheduler, to measure what each costs.

python -m tests.support.fake_server MODEL_DIR PORT [--step-ms MS]; prints CPU seconds by process when it is terminated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.process
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from srt.heartbeat import Board, Heartbeat
from srt.messages import Ready, ServerReady, ToLaunch
from srt.wire import Inbox, Outbox

ROLES = ("srt:api", "srt:tokenizer", "srt:scheduler")


def child(role: str, arguments: tuple[Any, ...]) -> None:
    """One process."""
    started = time.perf_counter()
    rundir, plan, step_s = arguments
    beat = Heartbeat.attach(Board.open(rundir), f"srt:{role}")
    signal.signal(signal.SIGTERM, lambda *_: beat.stop())
    match role:
        case "api":
            from srt.api.process import run

            run(plan, rundir, 0, beat)
        case "tokenizer":
            from srt.tokenizer.process import run as run_tokenizer

            run_tokenizer(plan, rundir, 0, beat)
        case _:
            from tests.support.fake_scheduler import Behaviour, FakeScheduler

            FakeScheduler(rundir, Behaviour(step_s=step_s)).run(lambda: beat.stopping)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = usage.ru_utime + usage.ru_stime
    print(
        f"{role:<10} cpu {cpu_s:.2f} s of {time.perf_counter() - started:.1f} s, {usage.ru_maxrss >> 10} MiB",
        flush=True,
    )


def main() -> None:
    """Run until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--step-ms", type=float, default=0.0)
    options = parser.parse_args()
    from tests.support.front import make_plan

    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    plan = make_plan(options.model, options.port, vocab_size=vocab_size, context_length=8192, max_queued_requests=4096)
    rundir = Path(tempfile.mkdtemp(prefix="srt-fake-"))
    Board.create(rundir, ROLES)
    context: zmq.Context[Any] = zmq.Context()
    inbox: Inbox[ToLaunch] = Inbox(context, rundir, "launch", ToLaunch)
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    arguments = (rundir, plan, options.step_ms / 1000)
    children = [
        spawn.Process(target=child, args=(role, arguments), daemon=True) for role in ("scheduler", "tokenizer", "api")
    ]
    for process in children:
        process.start()
    waiting = {"api", "tokenizer"}
    while waiting and not stop.is_set() and all(process.is_alive() for process in children):
        inbox.wait(200)
        waiting -= {message.role for message in inbox.drain() if isinstance(message, Ready)}
    if not waiting:
        Outbox(context, rundir, "api").send(ServerReady())
        print(f"ready after {time.perf_counter() - started:.2f} s", flush=True)
        stop.wait()
    for process in reversed(children):
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
