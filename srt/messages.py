"""Everything that one process may say to another.

    api ──Generate·Cancel·Call──▶ tokenizer ──Admit·Abort·StopMatched·Call──▶ scheduler ──StepPlan·Profile─▶ worker × tp
    api ◀─Deltas·Failed·Reply─── tokenizer ◀─Emitted·Failed·Reply─────────── scheduler ◀─StepResult·Profiled── worker
    image threads of the tokenizer ──ImageMade·ImageRefused──▶ tokenizer
    grammar threads of the tokenizer ──GrammarStored·GrammarRefused──▶ tokenizer
    tokenizer ──PrepareGrammar──▶ grammar thread of each worker ──GrammarLoaded──▶ tokenizer
    every process ──Ready·Fatal──▶ launch ──ServerReady·ServerLost──▶ api

Messages are frozen, keyed msgspec structs; the union of an edge is its protocol, decoded by type and closed
by `assert_never` in the one `match` of the receiving process. Commands are verbs, facts are nouns or
participles. Long id lists travel as little-endian int32 bytes: a 32k prompt decodes in microseconds that way.
"""

from __future__ import annotations

from typing import Final

from srt.errors import ErrorCode
from srt.making import GrammarLoaded as GrammarLoaded
from srt.making import GrammarRefused as GrammarRefused
from srt.making import GrammarStored as GrammarStored
from srt.making import ImageMade as ImageMade
from srt.making import ImageRefused as ImageRefused
from srt.making import PrepareGrammar as PrepareGrammar
from srt.payloads import ChatPrompt as ChatPrompt
from srt.payloads import Constraint as Constraint
from srt.payloads import ConstraintKind as ConstraintKind
from srt.payloads import Finish as Finish
from srt.payloads import GrammarSpec as GrammarSpec
from srt.payloads import GroupUsage as GroupUsage
from srt.payloads import ImageSource as ImageSource
from srt.payloads import ImageSpan as ImageSpan
from srt.payloads import LogprobParams as LogprobParams
from srt.payloads import Logprobs as Logprobs
from srt.payloads import LogprobSpec as LogprobSpec
from srt.payloads import Message as Message
from srt.payloads import RowEnding as RowEnding
from srt.payloads import RowLogprobs as RowLogprobs
from srt.payloads import SamplingParams as SamplingParams
from srt.payloads import SamplingSpec as SamplingSpec
from srt.payloads import SpeculationCounts as SpeculationCounts
from srt.payloads import StopSpec as StopSpec
from srt.payloads import TextPrompt as TextPrompt
from srt.payloads import ThinkingBudget as ThinkingBudget
from srt.payloads import Timing as Timing
from srt.payloads import TokenPrompt as TokenPrompt
from srt.payloads import joined as joined

# --- requests on their way down -------------------------------------------------------------------------


class Generate(Message, frozen=True):
    """Serve one prompt. `stream` asks for deltas as they come; otherwise one closing delta carries all.

    `namespace` separates cached prefixes (cache_salt and extra_key); equal prompts of two namespaces never meet.
    """

    rid: str
    prompt: TextPrompt | TokenPrompt | ChatPrompt
    sampling: SamplingParams
    stream: bool = False
    namespace: str = ""
    images: tuple[ImageSource, ...] = ()
    """In the order in which the prompt shows them."""
    received_ns: int = 0
    """`time.monotonic_ns()` when the API process took the request."""
    speculative: bool = True
    """Guess ahead, where the server has a drafter. Never changes the answer."""
    repeats: bool = False
    """Prompt and images are those of the `Generate` before this one, which were sent once: another answer to them."""


class Cancel(Message, frozen=True):
    """End this request, whatever its state; unknown ids are ignored."""

    rid: str


class Admit(Message, frozen=True):
    """A tokenized prompt ready to run. Its images, if any, are made."""

    rid: str
    token_ids: bytes
    sampling: SamplingSpec
    stop: StopSpec
    namespace: str = ""
    received_ns: int = 0
    """`time.monotonic_ns()` when the API process took the request."""
    images: tuple[ImageSpan, ...] = ()
    """In the order of `start`."""
    speculative: bool = True
    """Guess ahead, where the server has a drafter. Never changes the answer."""


class Abort(Message, frozen=True):
    """End this request, whatever its state; unknown ids are ignored."""

    rid: str


class StopMatched(Message, frozen=True):
    """A stop text of this request appeared; the tokenizer has already closed it towards the client."""

    rid: str


# --- answers on their way up ----------------------------------------------------------------------------


class Emission(Message, frozen=True):
    """New tokens of one request, its closing if `finish` is set."""

    rid: str
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0
    retractions: int = 0
    timing: Timing | None = None
    speculation: SpeculationCounts | None = None
    """Of the request so far; None if it never had guesses to check."""
    logprobs: Logprobs | None = None
    """Of `token_ids`, where the request wants them."""
    prompt_logprobs: Logprobs | None = None
    """Of the next positions of its prompt."""


class Emitted(Message, frozen=True):
    """All emissions of one step, one message."""

    emissions: list[Emission]
    released: list[str] = []
    """Requests with images that no step will look at any more."""


class Delta(Message, frozen=True):
    """Text and tokens to hand to a client; closes the request if `finish` is set."""

    rid: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    images: int = 0
    image_tokens: int = 0
    """Prompt tokens that stand for images; part of `prompt_tokens`."""
    thinking: bool = False
    """The prompt left the model within its reasoning."""
    reasoning_tokens: int = 0
    """Of the answer so far."""
    retractions: int = 0
    finish: Finish | None = None
    timing: Timing | None = None
    speculation: SpeculationCounts | None = None
    logprobs: Logprobs | None = None
    """Of `token_ids`, where the request wants them."""
    prompt_logprobs: Logprobs | None = None
    """Of the next positions of its prompt."""


class Deltas(Message, frozen=True):
    """All deltas of one step, one message."""

    deltas: list[Delta]


class Failed(Message, frozen=True):
    """The request ends with an error; nothing was or will be generated after it."""

    rid: str
    code: ErrorCode
    text: str
    param: str | None = None


# --- calls: a question from the API process and its answer ----------------------------------------------


class Tokenize(Message, frozen=True):
    """Text or chat messages to token ids, exactly as a request with this prompt would be tokenized."""

    call: int
    prompt: TextPrompt | TokenPrompt | ChatPrompt
    images: tuple[ImageSource, ...] = ()


class Detokenize(Message, frozen=True):
    """Token ids (int32 little-endian) to text."""

    call: int
    token_ids: bytes
    skip_special_tokens: bool = True


class FlushCache(Message, frozen=True):
    """Drop every cached prefix; refused while any request lives."""

    call: int


class AbortAll(Message, frozen=True):
    """End every request."""

    call: int


class StartProfile(Message, frozen=True):
    """Record what each worker does for `steps` steps, or until `StopProfile`, into files of `directory`.

    A file is called `NAME-TP-RANK.trace.json.gz`.
    """

    call: int
    directory: str
    name: str
    steps: int
    cpu: bool = True
    device: bool = True
    with_stack: bool = False
    record_shapes: bool = False


class StopProfile(Message, frozen=True):
    """End the recording and write the files."""

    call: int


class Profiled(Message, frozen=True):
    """A worker's answer to `StartProfile` and `StopProfile`: its file, or why not."""

    call: int
    rank: int
    ok: bool
    text: str = ""


class Tokenized(Message, frozen=True):
    """Answer to `Tokenize`: int32 little-endian ids."""

    call: int
    token_ids: bytes


class Detokenized(Message, frozen=True):
    """Answer to `Detokenize`."""

    call: int
    text: str


class Done(Message, frozen=True):
    """Answer to `FlushCache`, `AbortAll`, `StartProfile` and `StopProfile`."""

    call: int
    ok: bool
    text: str = ""


class CallFailed(Message, frozen=True):
    """The call could not be answered."""

    call: int
    code: ErrorCode
    text: str
    param: str | None = None


CANCEL_TO_FREE_BOUNDS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Upper bounds of the buckets in which the scheduler counts how long cancelled requests kept their pages."""
EVICTION_BOUNDS_S: Final = (1e-5, 5e-5, 1e-4, 5e-4, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5)
"""The same for evictions of cached pages."""


class SchedulerStats(Message, frozen=True):
    """The scheduler's gauges and totals, sent when they changed and the last report is old enough.

    `cancel_to_free_counts`: cancelled requests by the time until their pages were free, one bucket for each of
    `CANCEL_TO_FREE_BOUNDS_S` and one for what took longer; `cancel_to_free_s` is the sum of those times.
    `new_token_ratio`: share of its limit of new tokens that a request is expected to use.
    """

    running: int
    queued: int
    groups: tuple[GroupUsage, ...]
    steps: int = 0
    retracted_requests: int = 0
    retracted_input_tokens: int = 0
    retracted_output_tokens: int = 0
    evicted_tokens: int = 0
    cache_queries_tokens: int = 0
    cache_hit_tokens: int = 0
    generated_tokens: int = 0
    leaked_pages: int = 0
    gen_throughput: float = 0.0
    idle_s: float = 0.0
    images_encoded: int = 0
    image_cache_hits: int = 0
    image_batches: int = 0
    image_encode_s: float = 0.0
    speculation: SpeculationCounts | None = None
    retracted_waiting: int = 0
    new_token_ratio: float = 0.0
    cancel_to_free_counts: tuple[int, ...] = ()
    cancel_to_free_s: float = 0.0
    eviction_counts: tuple[int, ...] = ()
    eviction_s: float = 0.0
    missed_tokens: dict[str, int] = {}
    """Prompt tokens that were not found in the cache, by reason."""
    recorded_bytes: int = 0
    """What recorded steps hold of the first GPU's memory."""


# --- the step protocol ----------------------------------------------------------------------------------


class ImageWork(Message, frozen=True):
    """What the image tower did in a step. `hits` are images whose features were there already."""

    images: int
    hits: int
    batches: int
    elapsed_us: int


class RowStart(Message, frozen=True):
    """A request takes a row (again, after retraction): everything the worker needs to know of it, once.

    `token_ids`: all tokens known so far (prompt, then what was generated before a retraction), int32 bytes.
    `computed`: how many of them have KV already (prefix hit). `prompt_tokens` splits prompt from generated.
    `logprobs_from`: the first position of the prompt whose log probability is still wanted, at least `computed` + 1;
    None if none is.
    """

    row: int
    token_ids: bytes
    computed: int
    prompt_tokens: int
    sampling: SamplingSpec
    images: tuple[ImageSpan, ...] = ()
    """Those that reach beyond `computed`."""
    logprobs_from: int | None = None


class PageUpdate(Message, frozen=True):
    """Page table entries of one KV group that this step adds, as columns.

    For the i-th entry: row `rows[i]`, logical pages `[firsts[i], firsts[i] + counts[i])` are the next `counts[i]`
    of `pages`. Logical page j holds positions [j * page_size, (j + 1) * page_size). Entries that fell out of a
    sliding window are never named again: the worker's mask does not see them.
    """

    group: int
    rows: list[int]
    firsts: list[int]
    counts: list[int]
    pages: list[int]


class StepPlan(Message, frozen=True):
    """One forward pass, as columns in batch order, naming no sampled token: those stay with the worker.

    Row `rows[i]` computes its next `counts[i]` tokens; if `emits[i]` the worker samples the token that follows
    and it becomes the row's next input. A worker refuses a plan whose `step` is not the last one plus one.

    With a drafter, the worker goes on for up to `drafts[i]` tokens that it has guessed itself, samples after each, and
    keeps what it sampled as far as the guesses agree. `guess` says whether to guess ahead when the step is done.
    """

    step: int
    rows: list[int]
    counts: list[int]
    emits: list[bool]
    starts: list[RowStart] = []
    pages: list[PageUpdate] = []
    freed_rows: list[int] = []
    drafts: list[int] = []
    """Empty: none for any row."""
    guess: bool = True


class StepResult(Message, frozen=True):
    """What a step sampled: for each emitting row in plan order, `token_counts[i]` of `token_ids`.

    `drafted[i]` guesses were checked for it, of which all but the last of its tokens were right; empty: none at all.
    """

    step: int
    token_ids: list[int]
    token_counts: list[int]
    elapsed_us: int
    images: ImageWork | None = None
    """None if the step looked at no image."""
    drafted: list[int] = []
    guess_us: int = 0
    """Part of `elapsed_us` that went into guesses for the next step."""
    endings: list[RowEnding] = []
    """Of rows with a grammar, in plan order."""
    logprobs: list[RowLogprobs] = []
    """Of rows that want them, in plan order."""
    recorded_bytes: int = 0
    """What steps recorded so far hold of a GPU's memory."""


class WorkerFault(Message, frozen=True):
    """A step failed; the worker is about to exit."""

    rank: int
    text: str


# --- life of the processes ------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """This process can do its work. `facts` are for the start-up table; `memory` is bytes held, by part of the plan."""

    role: str
    rank: int = 0
    facts: dict[str, str] = {}
    memory: dict[str, int] = {}


class Phase(Message, frozen=True):
    """A phase of a process' start is over, at this time of the machine's monotonic clock; the next one begins."""

    role: str
    rank: int
    name: str
    at_s: float


class Progress(Message, frozen=True):
    """Bytes of weights loaded so far, for the progress bar."""

    rank: int
    done_bytes: int
    total_bytes: int


class Fatal(Message, frozen=True):
    """This process is about to exit; one sentence says why."""

    role: str
    rank: int
    text: str


class ServerReady(Message, frozen=True):
    """Every process has said `Ready`: the API process may take requests. From launch to api.

    `phases`: seconds of each phase of the start, up to the worker that was ready last.
    """

    phases: dict[str, float] = {}


class ServerLost(Message, frozen=True):
    """The other processes have ended; one sentence says why. From launch to the api role in another program."""

    text: str


ToTokenizer = (
    Generate
    | Cancel
    | Tokenize
    | Detokenize
    | FlushCache
    | AbortAll
    | StartProfile
    | StopProfile
    | ImageMade
    | ImageRefused
    | GrammarStored
    | GrammarRefused
    | GrammarLoaded
    | Emitted
    | Failed
    | Done
    | SchedulerStats
)
ToScheduler = (
    Admit
    | Abort
    | StopMatched
    | FlushCache
    | AbortAll
    | StartProfile
    | StopProfile
    | Profiled
    | StepResult
    | WorkerFault
)
ToWorker = StepPlan | StartProfile | StopProfile
ToGrammars = PrepareGrammar
ToApi = Deltas | Failed | Tokenized | Detokenized | Done | CallFailed | SchedulerStats | ServerReady | ServerLost
ToLaunch = Ready | Progress | Phase | Fatal
