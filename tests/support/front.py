"""The api and the tokenizer process for real, in threads, above a fake scheduler."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import zmq

import srt.api.process
import srt.tokenizer.process
from srt.api.auth import Secrets
from srt.configs.plan import DeviceFacts, GroupPlan, ModelFacts, RuntimePlan
from srt.configs.server import ServerConfig
from srt.formats.description import FORMATS
from srt.heartbeat import Board, Heartbeat
from srt.messages import Ready, ServerReady, ToLaunch
from srt.wire import Inbox, Outbox
from tests.support.fake_scheduler import FakeScheduler
from tests.support.server import Server, free_port

ROLES = ("srt:api", "srt:tokenizer", "srt:scheduler", "srt:worker[0]")
START_S = 20.0


def make_plan(model: Path, port: int, *, vocab_size: int, context_length: int = 512, **server: Any) -> RuntimePlan:
    """A plan as start-up would resolve it, for a model of which only the tokenizer exists."""
    config = ServerConfig(model_path=str(model), port=port, **server)
    return RuntimePlan(
        server=config,
        model=ModelFacts(
            path=str(model), architecture="Step3p5ForCausalLM", model_type="step3p5", dtype="bfloat16",
            vocab_size=vocab_size, context_length=context_length, bos_token_id=0, eos_token_ids=(1,), groups=(),
            weight_bytes={"text": 2_000_000},
        ),
        device=DeviceFacts("cpu", "test", 1 << 30, 2),
        dtype="float32",
        kv_dtype="float32",
        page_size=16,
        context_length=context_length,
        max_total_tokens=1000,
        groups=(
            GroupPlan("full", (0,), None, 2, 16, 60, 4096),
            GroupPlan("sliding", (1,), 64, 2, 16, 30, 4096),
        ),
        max_running_requests=16,
        max_queued_requests=48,
        chunked_prefill_size=256,
        max_step_tokens=512,
        steps_in_flight=2,
        worker_threads=1,
        random_seed=0,
        reasoning_format=config.reasoning_parser if config.reasoning_parser in FORMATS else "",
        call_format=config.tool_call_parser if config.tool_call_parser in FORMATS else "",
        memory={"weights: text": 4_000_000, "KV: full": 249_856},
    )  # fmt: skip


class Front(Server):
    """Speaks HTTP like `Server`, but everything runs in this process and the scheduler is a fake."""

    def __init__(self, model: Path, *, vocab_size: int, secrets: Secrets | None = None, **options: Any) -> None:
        super().__init__()
        self.plan = make_plan(model, free_port(), vocab_size=vocab_size, **options)
        self.port = self.plan.server.port
        self.secrets = secrets or Secrets()
        self.rundir = Path(tempfile.mkdtemp(prefix="srt-front-"))
        self.board = Board.create(self.rundir, ROLES)
        self.beats = {name: Heartbeat.attach(self.board, name) for name in ROLES}
        self.scheduler = FakeScheduler(self.rundir)
        self.context: zmq.Context[Any] = zmq.Context()
        self.launch: Inbox[ToLaunch] = Inbox(self.context, self.rundir, "launch", ToLaunch)
        self.api = Outbox(self.context, self.rundir, "api")
        self.failures: list[BaseException] = []
        self.threads: dict[str, threading.Thread] = {}

    def start(self) -> Self:
        """Start all parts and wait until the api and the tokenizer can work; the server is still loading then."""
        api, tokenizer = self.beats["srt:api"], self.beats["srt:tokenizer"]
        scheduler = self.beats["srt:scheduler"]
        self._spawn("scheduler", lambda: self.scheduler.run(lambda: scheduler.stopping))
        self._spawn("tokenizer", lambda: srt.tokenizer.process.run(self.plan, self.rundir, 0, tokenizer))
        self._spawn("api", lambda: srt.api.process.run(self.plan, self.rundir, 0, api, secrets=self.secrets))
        waiting, deadline = {"api", "tokenizer"}, time.monotonic() + START_S
        while waiting and time.monotonic() < deadline and not self.failures:
            self.launch.wait(50)
            waiting -= {message.role for message in self.launch.drain() if isinstance(message, Ready)}
        assert not waiting, f"not ready: {waiting}, {self.failures}"
        return self

    def _spawn(self, name: str, work: Any) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(error)
                raise

        self.threads[name] = threading.Thread(target=guarded, name=name, daemon=True)
        self.threads[name].start()

    def open(self) -> Self:
        """Tell the api that all processes are ready."""
        self.api.send(ServerReady({"plan": 0.5, "weights": 1.5}))
        return self.wait_ready()

    def wait_ready(self, timeout_s: float = START_S) -> Self:
        """Wait for `/ready`."""
        deadline = time.monotonic() + timeout_s
        while self.get("/ready").status != 200:
            assert time.monotonic() < deadline, self.get("/ready").text
            time.sleep(0.01)
        return self

    def finish(self) -> None:
        """Ask all to stop, the api first, and wait."""
        for name in ("api", "tokenizer", "scheduler"):
            self.beats[f"srt:{name}"].stop()
            self.threads[name].join(20)
            assert not self.threads[name].is_alive(), f"{name} did not stop"
        for beat in self.beats.values():
            beat.close()
        self.api.close()
        self.launch.close()
        self.context.term()
        assert not self.failures

    def wait_for(self, condition: Any, timeout_s: float = 5.0) -> None:
        """Wait until `condition()`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.005)

    @contextlib.contextmanager
    def behaving(self, **changes: Any) -> Iterator[None]:
        """Change the fake scheduler's behaviour for the block."""
        before = msgspec.structs.asdict(self.scheduler.behaviour)
        for name, value in changes.items():
            setattr(self.scheduler.behaviour, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.scheduler.behaviour, name, value)

    def __enter__(self) -> Self:
        return self.start().open()

    def __exit__(self, *_: Any) -> None:
        self.finish()
