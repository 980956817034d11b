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

import msgspec
import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import ErrorCode, ServingError
from srt.formats.description import FORMATS
from srt.heartbeat import Heartbeat
from srt.messages import (
    Abort,
    AbortAll,
    Admit,
    CallFailed,
    Cancel,
    ChatPrompt,
    Constraint,
    Delta,
    Deltas,
    Detokenize,
    Detokenized,
    Done,
    Emitted,
    Failed,
    Finish,
    FlushCache,
    Generate,
    GrammarLoaded,
    GrammarRefused,
    GrammarSpec,
    GrammarStored,
    ImageMade,
    ImageRefused,
    Ready,
    SchedulerStats,
    StartProfile,
    StopMatched,
    StopProfile,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenPrompt,
    ToTokenizer,
)
from srt.tokenizer.answer import Answer
from srt.tokenizer.grammar_desk import open_desk as open_grammar_desk
from srt.tokenizer.image_desk import open_desk
from srt.tokenizer.image_prompt import Picture
from srt.tokenizer.logprobs import Scores
from srt.tokenizer.prompt import Prompter, has_tools, unpack_ids
from srt.tokenizer.sampling import SamplingDefaults, SamplingResolver
from srt.tokenizer.template import ChatTemplate, find_template
from srt.tokenizer.thinking import Thinking
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
        reasoning, calls = FORMATS.get(plan.reasoning_format), FORMATS.get(plan.call_format)
        self.vocabulary = Vocabulary(directory, [mark for form in (reasoning, calls) if form for mark in form.marks])
        self.thinking = Thinking(self.vocabulary, reasoning, calls, plan.model.eos_token_ids)
        source = find_template(directory, self.vocabulary.config, plan.server.chat_template)
        template = None if source is None else ChatTemplate(source, self.vocabulary.specials)
        self.images = open_desk(plan, self.vocabulary, rundir, context)
        self.grammars = open_grammar_desk(plan, rundir, context)
        self.prompter = Prompter(
            self.vocabulary, template, plan.context_length, self.images.placeholder, end_thinking=self.thinking.ended
        )
        defaults = SamplingDefaults.of(read_json_object(directory / "generation_config.json"))
        self.resolver = SamplingResolver(defaults, plan.model.eos_token_ids, plan.context_length, plan.random_seed)
        self.inbox: Inbox[ToTokenizer] = Inbox(context, rundir, "tokenizer", ToTokenizer)
        self.api = Outbox(context, rundir, "api")
        self.scheduler = Outbox(context, rundir, "scheduler")
        self.arrived: Generate | None = None
        """The last request, whose prompt the next one may share."""
        self.arriving: dict[str, Generate] = {}
        self.asking: dict[int, Tokenize] = {}
        """Requests and calls whose images are not ready."""
        self.waiting: dict[str, tuple[Generate, tuple[Picture, ...]]] = {}
        self.constrained: dict[str, Admit] = {}
        """Requests whose grammar is not ready."""
        self.answers: dict[str, Answer] = {}

    def close(self) -> None:
        """Close the sockets; what was sent is handed over first."""
        self.images.close()
        self.grammars.close()
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
            self.admit(*self.waiting.pop(next(iter(self.waiting))))

    def receive(self, message: ToTokenizer) -> None:
        """The protocol of this process."""
        match message:
            case Emitted():
                self.emit(message)
            case Generate():
                self.arrive(message)
            case Cancel():
                self.cancel(message.rid)
            case Failed():
                self.fail(message)
            case Tokenize():
                self.ask_for_ids(message)
            case Detokenize():
                self.detokenize(message)
            case AbortAll() | FlushCache() | StartProfile() | StopProfile():
                self.pass_down(message)
            case ImageMade() | ImageRefused() | GrammarStored() | GrammarRefused() | GrammarLoaded():
                self.hear(message)
            case Done() | SchedulerStats():
                self.api.send(message)
            case _:
                assert_never(message)

    def arrive(self, request: Generate) -> None:
        """A request comes; its prompt waits for its turn, after its images if it has any."""
        if request.repeats:
            assert self.arrived is not None, "the first answer to a prompt brings it"
            request = msgspec.structs.replace(request, prompt=self.arrived.prompt, images=self.arrived.images)
        self.arrived = request
        if not request.images:
            self.waiting[request.rid] = request, ()
            return
        try:
            self.images.begin(request.rid, request.images)
        except ServingError as error:
            self.refuse(request, error)
            return
        self.arriving[request.rid] = request
        self.take_images()

    def hear(self, news: ImageMade | ImageRefused | GrammarStored | GrammarRefused | GrammarLoaded) -> None:
        """An image or a grammar is made, or is not."""
        match news:
            case ImageMade() | ImageRefused():
                self.images.hear(news)
                self.take_images()
            case GrammarStored() | GrammarRefused() | GrammarLoaded():
                self.grammars.hear(news)
                self.take_grammars()
            case _:
                assert_never(news)

    def take_images(self) -> None:
        """Go on with whose images are ready, and end those whose images are refused."""
        ready, failed = self.images.take()
        for owner, pictures in ready:
            match owner:
                case str():
                    self.waiting[owner] = self.arriving.pop(owner), pictures
                case int():
                    self.tokenize(self.asking.pop(owner), pictures)
                    self.images.release(owner)
        for owner, error in failed:
            match owner:
                case str():
                    self.refuse(self.arriving.pop(owner), error)
                case int():
                    self.refuse(self.asking.pop(owner), error)

    def refuse(self, work: Generate | Tokenize, error: ServingError) -> None:
        """Tell the client what is wrong."""
        match work:
            case Generate():
                self.api.send(Failed(work.rid, error.code, error.text, error.param))
            case Tokenize():
                self.api.send(CallFailed(work.call, error.code, error.text, error.param))
            case _:
                assert_never(work)

    def admit(self, request: Generate, pictures: tuple[Picture, ...]) -> None:
        """Tokenize a prompt and hand the request to the scheduler, or tell the client what is wrong with it."""
        try:
            packed, spans = self.images.place(self.packed_ids(request.prompt), pictures)
            prompt_tokens = len(packed) // _BYTES_PER_ID
            sampling, stop = self.resolver.resolve(request.sampling, prompt_tokens)
            thinks, with_tools = self.thinking.is_open(packed), has_tools(request.prompt)
            sampling = self.thinking.limited(
                sampling, request.sampling.thinking_budget, is_open=thinks, with_tools=with_tools
            )
            wanted = request.sampling.logprobs
            answer = Answer(
                request.rid,
                self.vocabulary,
                stop,
                stream=request.stream,
                skip_special_tokens=request.sampling.skip_special_tokens,
                prompt_tokens=prompt_tokens,
                images=len(spans),
                image_tokens=sum(span.tokens for span in spans),
                scores=None if wanted is None else Scores(wanted, packed, self.vocabulary),
                reasoning=self.thinking.count(is_open=thinks, with_tools=with_tools),
            )
        except ServingError as error:
            self.images.release(request.rid)
            self.refuse(request, error)
            return
        self.answers[request.rid] = answer
        admit = Admit(
            request.rid,
            packed,
            sampling,
            stop,
            namespace=request.namespace,
            received_ns=request.received_ns,
            images=spans,
            speculative=request.speculative,
        )
        if request.sampling.constraint is None:
            self.scheduler.send(admit)
        else:
            self.constrain(admit, request.sampling.constraint)

    def constrain(self, admit: Admit, constraint: Constraint) -> None:
        """Have a request's grammar made; it goes on when every worker has it."""
        spec = GrammarSpec(b"", admit.stop.token_ids, self.thinking.start_of(constraint, admit.token_ids))
        sampling = msgspec.structs.replace(admit.sampling, grammar=spec)
        self.constrained[admit.rid] = msgspec.structs.replace(admit, sampling=sampling)
        try:
            self.grammars.begin(admit.rid, constraint)
        except ServingError as error:
            self.drop_constrained(admit.rid)
            self.api.send(Failed(admit.rid, error.code, error.text, error.param))
            return
        self.take_grammars()

    def take_grammars(self) -> None:
        """Go on with whose grammars are ready, and end those whose constraints cannot be obeyed."""
        ready, failed = self.grammars.take()
        for rid, key in ready:
            admit = self.constrained.pop(rid)
            assert admit.sampling.grammar is not None
            grammar = msgspec.structs.replace(admit.sampling.grammar, key=key)
            sampling = msgspec.structs.replace(admit.sampling, grammar=grammar)
            self.scheduler.send(msgspec.structs.replace(admit, sampling=sampling))
        for rid, error in failed:
            self.drop_constrained(rid)
            self.api.send(Failed(rid, error.code, error.text, error.param))

    def drop_constrained(self, rid: str) -> None:
        """Forget a request whose grammar is not ready."""
        del self.constrained[rid], self.answers[rid]
        self.grammars.release(rid)
        self.images.release(rid)

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
        if self.images.cancel(rid):
            del self.arriving[rid]
            self.api.send(Deltas([Delta(rid, finish=Finish("abort", text="aborted before its images were decoded"))]))
        elif self.waiting.pop(rid, None) is not None:
            self.images.release(rid)
            self.api.send(Deltas([Delta(rid, finish=Finish("abort", text="aborted before its prompt was tokenized"))]))
        elif rid in self.constrained:
            self.drop_constrained(rid)
            self.api.send(Deltas([Delta(rid, finish=Finish("abort", text="aborted before its grammar was compiled"))]))
        elif rid in self.answers and not self.answers[rid].closed:
            self.scheduler.send(Abort(rid))

    def emit(self, emitted: Emitted) -> None:
        """Pass the tokens of one step on as text."""
        deltas: list[Delta] = []
        for emission in emitted.emissions:
            # A request whose stop string appeared is closed here first; its last emissions are for nobody.
            answer = self.answers[emission.rid]
            delta = None if answer.closed else answer.advance(emission)
            if delta is not None:
                deltas.append(delta)
                if delta.finish is not None and emission.finish is None:
                    self.scheduler.send(StopMatched(emission.rid))
            if emission.finish is not None:
                del self.answers[emission.rid]
                self.grammars.release(emission.rid)
        if deltas:
            self.api.send(Deltas(deltas))
        for rid in emitted.released:
            self.images.release(rid)

    def fail(self, failed: Failed) -> None:
        """The scheduler refuses or drops a request: tell the client, if it has no ending yet."""
        self.images.release(failed.rid)
        self.grammars.release(failed.rid)
        if not self.answers.pop(failed.rid).closed:
            self.api.send(failed)

    def pass_down(self, call: AbortAll | FlushCache | StartProfile | StopProfile) -> None:
        """Calls that the scheduler answers; `AbortAll` ends what has not come to it, too."""
        match call:
            case AbortAll():
                for rid in [*self.arriving, *self.waiting, *self.constrained]:
                    self.cancel(rid)
            case FlushCache() | StartProfile() | StopProfile():
                pass
            case _:
                assert_never(call)
        self.scheduler.send(call)

    def detokenize(self, call: Detokenize) -> None:
        """Answer `/detokenize`."""
        text = self.vocabulary.decode(unpack_ids(call.token_ids), skip_special_tokens=call.skip_special_tokens)
        self.api.send(Detokenized(call.call, text))

    def ask_for_ids(self, call: Tokenize) -> None:
        """`/tokenize` is answered at once, with images when they are ready."""
        if not call.images:
            self.tokenize(call, ())
            return
        try:
            self.images.begin(call.call, call.images)
        except ServingError as error:
            self.refuse(call, error)
            return
        self.asking[call.call] = call
        self.take_images()

    def tokenize(self, call: Tokenize, pictures: tuple[Picture, ...]) -> None:
        """Answer `/tokenize`."""
        try:
            packed, _ = self.images.place(self.packed_ids(call.prompt), pictures)
            self.api.send(Tokenized(call.call, packed))
        except ServingError as error:
            self.refuse(call, error)


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
