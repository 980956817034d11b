"""The tokenizer process: encode what comes from the api, decode what comes from the scheduler.

Answers go first: of the prompts that wait, one is tokenized between two looks into the inbox, so that a burst of
long prompts delays no token of a running answer by more than one of them.
"""

from __future__ import annotations

import gc
import logging
import uuid
from pathlib import Path
from typing import Any, Final, assert_never

import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import ErrorCode, ServingError
from srt.heartbeat import Heartbeat
from srt.messages import (
    Abort,
    AbortAll,
    Admit,
    CallFailed,
    Cancel,
    ChatPrompt,
    Delta,
    Deltas,
    Detokenize,
    Detokenized,
    Done,
    Emission,
    Emitted,
    Failed,
    Finish,
    FlushCache,
    Generate,
    Ready,
    SchedulerStats,
    StopMatched,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenPrompt,
    ToTokenizer,
)
from srt.tokenizer.answer import Answer
from srt.tokenizer.prompt import Prompter, unpack_ids
from srt.tokenizer.sampling import SamplingDefaults, SamplingResolver
from srt.tokenizer.template import ChatTemplate, find_template
from srt.tokenizer.vocabulary import Vocabulary, read_json_object
from srt.wire import Inbox, Outbox

log = logging.getLogger(__name__)

POLL_MS: Final = 200
"""Longest wait for a message before looking whether to stop."""

GARBAGE_EVERY: Final = 50_000
"""New objects between two collections of the youngest: messages are many and form no cycles."""

_BYTES_PER_ID: Final = 4


class TokenizerProcess:
    """All requests between the api and the scheduler: those whose prompt waits, and those whose answer grows."""

    def __init__(self, plan: RuntimePlan, rundir: Path, context: zmq.Context[Any]) -> None:
        directory = Path(plan.model.path)
        self.vocabulary = Vocabulary(directory)
        source = find_template(directory, self.vocabulary.config, plan.server.chat_template)
        template = None if source is None else ChatTemplate(source, self.vocabulary.specials)
        self.prompter = Prompter(self.vocabulary, template, plan.context_length)
        defaults = SamplingDefaults.of(read_json_object(directory / "generation_config.json"))
        self.resolver = SamplingResolver(defaults, plan.model.eos_token_ids, plan.context_length, plan.random_seed)
        self.inbox: Inbox[ToTokenizer] = Inbox(context, rundir, "tokenizer", ToTokenizer)
        self.api = Outbox(context, rundir, "api")
        self.scheduler = Outbox(context, rundir, "scheduler")
        self.waiting: dict[str, Generate] = {}
        self.answers: dict[str, Answer] = {}

    def close(self) -> None:
        """Close the sockets; what was sent is handed over first."""
        for outbox in (self.api, self.scheduler):
            outbox.close()
        self.inbox.close()

    def turn(self) -> None:
        """Wait for something to do and do it."""
        if not self.waiting:
            self.inbox.wait(POLL_MS)
        for message in self.inbox.drain():
            self.receive(message)
        if self.waiting:
            self.admit(self.waiting.pop(next(iter(self.waiting))))

    def receive(self, message: ToTokenizer) -> None:
        """The protocol of this process."""
        match message:
            case Emitted():
                self.emit(message.emissions)
            case Generate():
                self.waiting[message.rid] = message
            case Cancel():
                self.cancel(message.rid)
            case Failed():
                self.fail(message)
            case Tokenize():
                self.tokenize(message)
            case Detokenize():
                self.detokenize(message)
            case AbortAll():
                self.abort_all(message)
            case FlushCache():
                self.scheduler.send(message)
            case Done() | SchedulerStats():
                self.api.send(message)
            case _:
                assert_never(message)

    def admit(self, request: Generate) -> None:
        """Tokenize a prompt and hand the request to the scheduler, or tell the client what is wrong with it."""
        try:
            packed = self.packed_ids(request.prompt)
            prompt_tokens = len(packed) // _BYTES_PER_ID
            sampling, stop = self.resolver.resolve(request.sampling, prompt_tokens)
        except ServingError as error:
            self.api.send(Failed(request.rid, error.code, error.text, error.param))
            return
        self.answers[request.rid] = Answer(
            request.rid,
            self.vocabulary,
            stop,
            stream=request.stream,
            skip_special_tokens=request.sampling.skip_special_tokens,
            prompt_tokens=prompt_tokens,
        )
        self.scheduler.send(
            Admit(
                request.rid,
                packed,
                sampling,
                stop,
                namespace=request.namespace,
                received_ns=request.received_ns,
                speculative=request.speculative,
            )
        )

    def packed_ids(self, prompt: TextPrompt | TokenPrompt | ChatPrompt) -> bytes:
        """Ids of a prompt. What a client's words make templates and libraries do must not end everybody's server.

        Raises: ServingError if the prompt is wrong, or INTERNAL with an incident id that the log has.
        """
        try:
            return self.prompter.packed_ids(prompt)
        except ServingError:
            raise
        except Exception as error:
            name = uuid.uuid4().hex[:12]
            log.exception("incident %s in tokenizing a prompt", name)
            raise ServingError(ErrorCode.INTERNAL, f"internal error; the log has it as incident {name}") from error

    def cancel(self, rid: str) -> None:
        """End a request: here if its prompt still waits, else through the scheduler, which closes it."""
        if self.waiting.pop(rid, None) is not None:
            self.api.send(Deltas([Delta(rid, finish=Finish("abort", text="aborted before its prompt was tokenized"))]))
        elif rid in self.answers and not self.answers[rid].closed:
            self.scheduler.send(Abort(rid))

    def emit(self, emissions: list[Emission]) -> None:
        """Pass the tokens of one step on as text."""
        deltas: list[Delta] = []
        for emission in emissions:
            # A request whose stop string appeared is closed here first; its last emissions are for nobody.
            answer = self.answers[emission.rid]
            delta = None if answer.closed else answer.advance(emission)
            if delta is not None:
                deltas.append(delta)
                if delta.finish is not None and emission.finish is None:
                    self.scheduler.send(StopMatched(emission.rid))
            if emission.finish is not None:
                del self.answers[emission.rid]
        if deltas:
            self.api.send(Deltas(deltas))

    def fail(self, failed: Failed) -> None:
        """The scheduler refuses or drops a request: tell the client, if it has no ending yet."""
        if not self.answers.pop(failed.rid).closed:
            self.api.send(failed)

    def abort_all(self, call: AbortAll) -> None:
        """End every request; the scheduler answers the call."""
        for rid in list(self.waiting):
            self.cancel(rid)
        self.scheduler.send(call)

    def detokenize(self, call: Detokenize) -> None:
        """Answer `/detokenize`."""
        text = self.vocabulary.decode(unpack_ids(call.token_ids), skip_special_tokens=call.skip_special_tokens)
        self.api.send(Detokenized(call.call, text))

    def tokenize(self, call: Tokenize) -> None:
        """Answer `/tokenize`."""
        try:
            self.api.send(Tokenized(call.call, self.packed_ids(call.prompt)))
        except ServingError as error:
            self.api.send(CallFailed(call.call, error.code, error.text, error.param))


def run(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Serve until `beat.stopping`. Raises: StartupError if the checkpoint's tokenizer is not usable."""
    context: zmq.Context[Any] = zmq.Context()
    launch = Outbox(context, rundir, "launch")
    process = TokenizerProcess(plan, rundir, context)
    try:
        gc.freeze()
        gc.set_threshold(GARBAGE_EVERY)
        launch.send(Ready("tokenizer", rank))
        while not beat.stopping:
            process.turn()
    finally:
        process.close()
        launch.close()
        context.destroy()
