"""The tokenizer's dealings with constraints: from a request that has one to a grammar that every worker has loaded.

    begin ─▶ compiled ─▶ loaded by every worker ─▶ ready: the request goes on, its grammar is held ─▶ release
                └─▶ refused: the request ends

What was compiled, and what was refused, is remembered: the next request with the same constraint goes on at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, assert_never

import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import ErrorCode, ServingError
from srt.grammar.process import Outcome, Rejected, Setup, Stored
from srt.grammar.shelf import GrammarFiles, key_of
from srt.messages import Constraint, GrammarLoaded, GrammarRefused, GrammarStored, PrepareGrammar
from srt.tokenizer.grammar_pool import GrammarPool
from srt.wire import Outbox

PROCESSES_MAX: Final = 2
"""Grammar processes: a constraint that takes all its time does not hold up the next one."""

FILES_BYTES: Final = 512 << 20
"""Compiled grammars on disk. Beyond it those go that nobody needs, the least recently used first."""

REFUSALS_MAX: Final = 1024
"""Refused constraints that are remembered, so that none is compiled in vain again and again."""

Ready = tuple[str, bytes]
Fault = tuple[str, ServingError]


class GrammarDesk(Protocol):
    """Grammars from the arrival of a constraint to the end of the last request that obeys it."""

    def begin(self, owner: str, constraint: Constraint) -> None:
        """Make this grammar. Raises: ServingError if constraints are not served."""
        ...

    def hear(self, news: GrammarStored | GrammarRefused | GrammarLoaded) -> None:
        """What became of a grammar."""
        ...

    def take(self) -> tuple[list[Ready], list[Fault]]:
        """Owners whose grammar is ready, with its key, and those that have failed, since the last time."""
        ...

    def release(self, owner: str) -> None:
        """An owner's grammar, if it has or awaits one, is not needed any more."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


class NoGrammars:
    """The desk of a server that obeys no constraints."""

    def begin(self, owner: str, constraint: Constraint) -> None:
        """Raises: ServingError, always."""
        text = "this server has been started without constrained output (--grammar-backend none)"
        raise ServingError(ErrorCode.UNSUPPORTED_FIELD, text, constraint.field or constraint.kind)

    def hear(self, news: GrammarStored | GrammarRefused | GrammarLoaded) -> None:
        """Never called: no grammar is ever made."""
        raise AssertionError(news)

    def take(self) -> tuple[list[Ready], list[Fault]]:
        """Nothing."""
        return [], []

    def release(self, owner: str) -> None:
        """Nobody holds anything."""

    def close(self) -> None:
        """Nothing runs."""


class Compilers(Protocol):
    """Compiles in the background and answers by key."""

    def submit(self, key: bytes, constraint: Constraint) -> None:
        """Compile a constraint."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class Sender(Protocol):
    """The end of an edge that takes messages."""

    def send(self, message: PrepareGrammar) -> None:
        """Queue a message; never blocks."""
        ...

    def close(self) -> None:
        """Close the edge."""
        ...


class CompilingDesk:
    """The desk of a server with a grammar backend.

    `_sizes`: what lies on disk, in bytes by key, the least recently used first. `_awaited`: keys that are being
    compiled or loaded, with the workers that are still to say so (None before it is compiled), and who waits.
    """

    def __init__(self, pool: Compilers, workers: Sequence[Sender], files: GrammarFiles) -> None:
        self._pool, self._workers, self._files = pool, workers, files
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._refusals: OrderedDict[bytes, str] = OrderedDict()
        self._missing: Counter[bytes] = Counter()
        self._waiting: dict[bytes, dict[str, Constraint]] = {}
        self._held: dict[str, bytes] = {}
        self._users: Counter[bytes] = Counter()
        self._ready: list[Ready] = []
        self._failed: list[Fault] = []

    def begin(self, owner: str, constraint: Constraint) -> None:
        """Make this grammar, or take it from those that are made."""
        key = key_of(constraint)
        self._held[owner] = key
        self._users[key] += 1
        if key in self._waiting:
            self._waiting[key][owner] = constraint
        elif key in self._sizes:
            self._sizes.move_to_end(key)
            self._ready.append((owner, key))
        elif key in self._refusals:
            self._refusals.move_to_end(key)
            self._fail(owner, constraint, f"cannot be obeyed: {self._refusals[key]}", ErrorCode.INVALID_REQUEST)
        else:
            self._waiting[key] = {owner: constraint}
            self._pool.submit(key, constraint)

    def hear(self, news: GrammarStored | GrammarRefused | GrammarLoaded) -> None:
        """What became of a grammar."""
        match news:
            case GrammarStored():
                self._sizes[news.key] = news.data_bytes
                self._missing[news.key] = len(self._workers)
                for worker in self._workers:
                    worker.send(PrepareGrammar(news.key))
            case GrammarRefused():
                self._refuse(news.key, news.text)
            case GrammarLoaded():
                self._loaded(news)
            case _:
                assert_never(news)

    def _loaded(self, news: GrammarLoaded) -> None:
        if news.key not in self._missing:
            return  # another worker could not load it
        if news.fault:
            del self._missing[news.key], self._sizes[news.key]
            self._files.remove(news.key)
            self._fail_all(news.key, f"cannot be obeyed here: {news.fault}", ErrorCode.INTERNAL)
            return
        self._missing[news.key] -= 1
        if not self._missing[news.key]:
            del self._missing[news.key]
            self._ready += [(owner, news.key) for owner in self._waiting.pop(news.key)]
            self._trim()

    def _refuse(self, key: bytes, text: str) -> None:
        self._refusals[key] = text
        if len(self._refusals) > REFUSALS_MAX:
            self._refusals.popitem(last=False)
        self._fail_all(key, f"cannot be obeyed: {text}", ErrorCode.INVALID_REQUEST)

    def _fail_all(self, key: bytes, text: str, code: ErrorCode) -> None:
        for owner, constraint in self._waiting.pop(key).items():
            self._fail(owner, constraint, text, code)

    def _fail(self, owner: str, constraint: Constraint, text: str, code: ErrorCode) -> None:
        self.release(owner)
        name = constraint.field or constraint.kind
        self._failed.append((owner, ServingError(code, f"'{name}' {text}", name)))

    def take(self) -> tuple[list[Ready], list[Fault]]:
        """Owners whose grammar is ready, with its key, and those that have failed, since the last time."""
        ready, failed = self._ready, self._failed
        self._ready, self._failed = [], []
        return ready, failed

    def release(self, owner: str) -> None:
        """An owner's grammar, if it has or awaits one, is not needed any more."""
        key = self._held.pop(owner, None)
        if key is None:
            return
        self._waiting.get(key, {}).pop(owner, None)
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._trim()

    def _trim(self) -> None:
        """Drop what nobody needs, as long as there is too much."""
        excess = sum(self._sizes.values()) - FILES_BYTES
        for key in list(self._sizes) if excess > 0 else ():
            if excess <= 0:
                return
            if key not in self._users and key not in self._missing:
                excess -= self._sizes.pop(key)
                self._files.remove(key)

    def close(self) -> None:
        """Stop the grammar processes."""
        self._pool.close()
        for worker in self._workers:
            worker.close()


class _Messenger:
    """Sends outcomes from a pool thread into the tokenizer's own inbox."""

    def __init__(self, context: zmq.Context[Any], rundir: Path) -> None:
        self._outbox = Outbox(context, rundir, "tokenizer")

    def deliver(self, key: bytes, outcome: Outcome) -> None:
        """Pass an outcome on."""
        match outcome:
            case Stored(data_bytes, seconds):
                self._outbox.send(GrammarStored(key, data_bytes, seconds))
            case Rejected(text):
                self._outbox.send(GrammarRefused(key, text))
            case _:
                assert_never(outcome)

    def close(self) -> None:
        """Close the socket."""
        self._outbox.close()


def open_desk(plan: RuntimePlan, rundir: Path, context: zmq.Context[Any]) -> GrammarDesk:
    """The desk for a plan."""
    server, model = plan.server, plan.model
    if server.grammar_backend == "none":
        return NoGrammars()
    files = GrammarFiles(rundir)
    files.make()
    setup = Setup(
        server.grammar_backend,
        model.path,
        model.vocab_size,
        model.eos_token_ids,
        str(rundir),
        server.max_grammar_seconds,
    )
    processes = min(PROCESSES_MAX, plan.device.cores)
    pool = GrammarPool(setup, processes, lambda: _Messenger(context, rundir))
    workers = [Outbox(context, rundir, f"grammar{rank}") for rank in range(server.tp_size)]
    return CompilingDesk(pool, workers, files)
