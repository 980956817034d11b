"""Everything that one process may say to another.

    api ──Generate·Cancel·Call──▶ tokenizer ──Admit·Abort·StopMatched·Call──▶ scheduler ──StepPlan──▶ worker × tp
    api ◀─Deltas·Failed·Reply─── tokenizer ◀─Emitted·Failed·Reply─────────── scheduler ◀─StepResult── worker 0
    every process ──Ready·Fatal──▶ launch ──ServerReady──▶ api

Messages are frozen, keyed msgspec structs; the union of an edge is its protocol, decoded by type and closed
by `assert_never` in the one `match` of the receiving process. Commands are verbs, facts are nouns or
participles. Long id lists travel as little-endian int32 bytes: a 32k prompt decodes in microseconds that way.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from srt.errors import ErrorCode


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages: immutable, tagged with its class name, defaults are not sent."""


# --- requests on their way down -------------------------------------------------------------------------


class SamplingSpec(Message, frozen=True):
    """How the worker turns logits into a token. Filters apply in the order top_k, top_p, min_p.

    `temperature` 0 is greedy. `top_k` 0 keeps all. `seed` names the noise: a token drawn at position p of a
    request depends on (seed, p) and the logits only, so that batch, chunking and retraction cannot change it.
    Until `min_new_tokens` tokens exist the ids of `suppressed_ids` (end and stop ids) cannot be drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    min_new_tokens: int = 0
    suppressed_ids: tuple[int, ...] = ()


class StopSpec(Message, frozen=True):
    """What ends a request. `token_ids` holds the end-of-sequence ids too, unless the caller ignores them."""

    max_new_tokens: int
    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    keep_text: bool = False
    """Leave the matched stop text in the answer (`no_stop_trim`)."""


class TextPrompt(Message, frozen=True):
    """A prompt as text; `add_special_tokens` lets the tokenizer put its own opening tokens in front."""

    text: str
    add_special_tokens: bool = True


class TokenPrompt(Message, frozen=True):
    """A prompt as token ids, int32 little-endian."""

    token_ids: bytes


class ChatPrompt(Message, frozen=True):
    """A prompt as chat messages: JSON texts as the client sent them, rendered by the checkpoint's template."""

    messages: bytes
    tools: bytes = b""
    template_kwargs: bytes = b""


class SamplingParams(Message, frozen=True):
    """What a client asked for, checked for type and range, before anything about the model is known.

    `None` means: not given; the tokenizer fills in the checkpoint's generation_config or the neutral value.
    `max_new_tokens` must fit behind the prompt. Where it is not given, `usual_new_tokens` is cut to the room that
    is left; without that either, all the room is used.
    """

    max_new_tokens: int | None = None
    usual_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


class Generate(Message, frozen=True):
    """Serve one prompt. `stream` asks for deltas as they come; otherwise one closing delta carries all.

    `namespace` separates cached prefixes (cache_salt and extra_key); equal prompts of two namespaces never meet.
    """

    rid: str
    prompt: TextPrompt | TokenPrompt | ChatPrompt
    sampling: SamplingParams
    stream: bool = False
    namespace: str = ""
    received_ns: int = 0
    """`time.monotonic_ns()` when the API process took the request."""
    speculative: bool = True
    """Guess ahead, where the server has a drafter. Never changes the answer."""


class Cancel(Message, frozen=True):
    """End this request, whatever its state; unknown ids are ignored."""

    rid: str


class Admit(Message, frozen=True):
    """A tokenized prompt ready to run."""

    rid: str
    token_ids: bytes
    sampling: SamplingSpec
    stop: StopSpec
    namespace: str = ""
    received_ns: int = 0
    """`time.monotonic_ns()` when the API process took the request."""
    speculative: bool = True
    """Guess ahead, where the server has a drafter. Never changes the answer."""


class Abort(Message, frozen=True):
    """End this request, whatever its state; unknown ids are ignored."""

    rid: str


class StopMatched(Message, frozen=True):
    """A stop text of this request appeared; the tokenizer has already closed it towards the client."""

    rid: str


# --- answers on their way up ----------------------------------------------------------------------------


class Finish(Message, frozen=True):
    """Why a request ended. `matched` is the stop id or stop text for kind "stop"."""

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    text: str = ""


class Timing(Message, frozen=True):
    """Stages of a request in seconds since it was received, filled in when it closes."""

    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


class SpeculationCounts(Message, frozen=True):
    """What guessing ahead came to: `steps` that checked guesses, guesses that were checked and that were right, and
    how many steps had 0, 1, 2, .. right ones. Counted before an ending cuts tokens off."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: tuple[int, ...] = ()


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


class Emitted(Message, frozen=True):
    """All emissions of one step, one message."""

    emissions: list[Emission]


class Delta(Message, frozen=True):
    """Text and tokens to hand to a client; closes the request if `finish` is set."""

    rid: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    finish: Finish | None = None
    timing: Timing | None = None
    speculation: SpeculationCounts | None = None


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
    prompt: TextPrompt | ChatPrompt


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


class Tokenized(Message, frozen=True):
    """Answer to `Tokenize`: int32 little-endian ids."""

    call: int
    token_ids: bytes


class Detokenized(Message, frozen=True):
    """Answer to `Detokenize`."""

    call: int
    text: str


class Done(Message, frozen=True):
    """Answer to `FlushCache` and `AbortAll`."""

    call: int
    ok: bool
    text: str = ""


class CallFailed(Message, frozen=True):
    """The call could not be answered."""

    call: int
    code: ErrorCode
    text: str
    param: str | None = None


class GroupUsage(Message, frozen=True):
    """Tokens of one KV group's pool by owner; free + requests + tree = total."""

    name: str
    total_tokens: int
    free_tokens: int
    request_tokens: int
    tree_tokens: int
    evictable_tokens: int


CANCEL_TO_FREE_BOUNDS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Upper bounds of the buckets in which the scheduler counts how long cancelled requests kept their pages."""


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
    speculation: SpeculationCounts | None = None
    retracted_waiting: int = 0
    new_token_ratio: float = 0.0
    cancel_to_free_counts: tuple[int, ...] = ()
    cancel_to_free_s: float = 0.0


# --- the step protocol ----------------------------------------------------------------------------------


class RowStart(Message, frozen=True):
    """A request takes a row (again, after retraction): everything the worker needs to know of it, once.

    `token_ids`: all tokens known so far (prompt, then what was generated before a retraction), int32 bytes.
    `computed`: how many of them have KV already (prefix hit). `prompt_tokens` splits prompt from generated.
    """

    row: int
    token_ids: bytes
    computed: int
    prompt_tokens: int
    sampling: SamplingSpec


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
    drafted: list[int] = []
    guess_us: int = 0
    """Part of `elapsed_us` that went into guesses for the next step."""


class WorkerFault(Message, frozen=True):
    """A step failed; the worker is about to exit."""

    rank: int
    text: str


# --- life of the processes ------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """This process can do its work. `facts` are measured values for the start-up table."""

    role: str
    rank: int = 0
    facts: dict[str, str] = {}


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
    """Every process has said `Ready`: the API process may take requests. From launch to api."""


ToTokenizer = (
    Generate | Cancel | Tokenize | Detokenize | FlushCache | AbortAll | Emitted | Failed | Done | SchedulerStats
)
ToScheduler = Admit | Abort | StopMatched | FlushCache | AbortAll | StepResult | WorkerFault
ToWorker = StepPlan
ToApi = Deltas | Failed | Tokenized | Detokenized | Done | CallFailed | SchedulerStats | ServerReady
ToLaunch = Ready | Progress | Fatal
