"""What messages carry: the structs that never travel alone.

`srt/messages.py` says who sends what to whom; its names are the ones to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages: immutable, tagged with its class name, defaults are not sent."""


class GrammarSpec(Message, frozen=True):
    """A compiled constraint, as the worker obeys it. `key` names the file that it is in (`srt/grammar/shelf.py`).

    It begins with the answer, or behind the first `after_token` of it; before that, and wherever the grammar cannot
    end, no id of `stop_ids` is drawn.
    """

    key: bytes
    stop_ids: tuple[int, ...] = ()
    after_token: int | None = None


class LogprobSpec(Message, frozen=True):
    """Log probabilities that a request wants: of each new token and, from position `prompt_from` on, of its prompt's.

    At each position also of the `top` most likely tokens and of the tokens `ids`. They are those of the model's own
    distribution, softmax(logits), before anything that sampling does to it.
    """

    top: int = 0
    ids: tuple[int, ...] = ()
    prompt_from: int | None = None
    """At least 1: nothing is known before the first token. None: the prompt is not looked at."""


class ThinkingBudget(Message, frozen=True):
    """How long a request that begins within its reasoning may think: after `tokens` tokens of its answer, if none of
    `end_ids` is among them, `close_id` comes."""

    tokens: int
    close_id: int
    end_ids: tuple[int, ...]


class SamplingSpec(Message, frozen=True):
    """How the worker turns logits into a token.

    First, for what the row already has: `repetition_penalty` divides positive logits of tokens of prompt and answer
    and multiplies negative ones; `frequency_penalty` is subtracted once for each time that the answer has the token,
    `presence_penalty` once if it has. Then `logit_bias` is added. Filters apply in the order top_k, top_p, min_p.

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
    grammar: GrammarSpec | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of id and what is added to its logit, no id twice."""
    logprobs: LogprobSpec | None = None
    thinking: ThinkingBudget | None = None


class StopSpec(Message, frozen=True):
    """What ends a request. `token_ids` holds the end-of-sequence ids too, unless the caller ignores them."""

    max_new_tokens: int
    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
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


class ImageSource(Message, frozen=True):
    """An image as the client gave it: a data URI, base64, or the URL of a listed host.

    `detail` "low" shows the model the global view alone, "high" and "auto" crops too, where it is large enough.
    """

    text: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImageSpan(Message, frozen=True):
    """An image in a prompt: its tokens are `[start, start + tokens)`.

    `key` is a hash of all that the model sees of it; its pixels wait in the file of that name (`srt/tiles.py`).
    It has `columns` x `rows` crops and a global view.
    """

    key: bytes
    start: int
    tokens: int
    columns: int
    rows: int


class LogprobParams(Message, frozen=True):
    """Log probabilities as a client asks for them; see `LogprobSpec`.

    `prompt_from`: the first position of the prompt that the answer lists; -1 is its last one, None leaves it out.
    `texts`: with the bytes of every token that is named.
    """

    top: int = 0
    ids: tuple[int, ...] = ()
    prompt_from: int | None = None
    texts: bool = True


ConstraintKind = Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag"]


class Constraint(Message, frozen=True):
    """The form that an answer must have. What `text` is, by kind:

        json_schema      a JSON schema
        json_object      nothing: any JSON object
        regex            a regular expression that the whole answer matches
        ebnf             a grammar in EBNF with a rule `root`
        choice           a JSON list of texts, of which the answer is one
        structural_tag   a structural tag as JSON

    It holds from the first token on, or from behind the first `after_token` of the answer. With `after_thinking` the
    tokenizer decides: where the prompt leaves the model thinking, `after_token` becomes the end of the thinking.
    """

    kind: ConstraintKind
    text: str = ""
    after_token: int | None = None
    after_thinking: bool = False
    strict: bool = True
    """Of a JSON schema: objects have no properties but those it lists, and it says nothing that cannot be enforced."""
    field: str = ""
    """What its author calls it, for messages about it."""


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
    stop_regexes: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: LogprobParams | None = None
    thinking_budget: int | None = None
    """Most tokens of reasoning."""
    constraint: Constraint | None = None


class Logprobs(Message, frozen=True):
    """Natural logarithms of probabilities at N consecutive positions of a request, little-endian.

    Of the token that stands there, of the K most likely ones in falling order, and of the M tokens that the client
    lists. NaN where nothing was computed: at the first position that a client asked for in its prompt.
    """

    token_ids: bytes
    """[N] int32."""
    values: bytes
    """[N] float32."""
    top_ids: bytes = b""
    """[N, K] int32."""
    top_values: bytes = b""
    """[N, K] float32."""
    listed: bytes = b""
    """[N, M] float32."""
    texts: tuple[bytes, ...] = ()
    """Bytes of the N tokens, then of the N x K, then of the M; empty where nobody wants them."""

    def __len__(self) -> int:
        return len(self.token_ids) // 4

    def head(self, count: int) -> Logprobs:
        """The first positions. Only before there are texts."""
        size = len(self)
        if count >= size:
            return self

        def cut(column: bytes) -> bytes:
            return column[: len(column) // size * count]

        return Logprobs(
            cut(self.token_ids), cut(self.values), cut(self.top_ids), cut(self.top_values), cut(self.listed)
        )


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """Several runs of positions as one. Only before there are texts."""
    if len(parts) == 1:
        return parts[0]
    return Logprobs(
        b"".join([part.token_ids for part in parts]),
        b"".join([part.values for part in parts]),
        b"".join([part.top_ids for part in parts]),
        b"".join([part.top_values for part in parts]),
        b"".join([part.listed for part in parts]),
    )


class RowLogprobs(Message, frozen=True):
    """What a step says about a row that wants log probabilities; `at` is the row's place in the plan.

    `prompt`: of positions of the prompt that the step has reached; `output`: of the row's new tokens.
    """

    at: int
    prompt: Logprobs | None = None
    output: Logprobs | None = None


class RowEnding(Message, frozen=True):
    """The grammar of a row has come to its end in a step. `at`: the row's place among those that emit.

    Of its new tokens the first `tokens` count: nothing can follow them. With `fault`, nothing could be sampled in the
    place of the last of them, or must be: the request fails, and this says why.
    """

    at: int
    tokens: int
    fault: str = ""


class Finish(Message, frozen=True):
    """Why a request ended. `matched` is the stop id or stop text for kind "stop"."""

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    text: str = ""


class Timing(Message, frozen=True):
    """Stages of a request in seconds since it was received, filled in when it closes.

    `tokenized_s`: the scheduler has it; `queue_s`: its first step is planned; then its first token, and its end.
    """

    tokenized_s: float = 0.0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


class SpeculationCounts(Message, frozen=True):
    """What guessing ahead came to: `steps` that checked guesses, guesses that were checked and that were right, and
    how many steps had 0, 1, 2, .. right ones. Counted before an ending cuts tokens off.

    `plain` steps brought a token and had no guess to check: a prompt's last one, and those of decodes without guesses.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: tuple[int, ...] = ()
    plain: int = 0

    @property
    def all_steps(self) -> int:
        """Steps that brought tokens."""
        return self.steps + self.plain


class GroupUsage(Message, frozen=True):
    """Tokens of one KV group's pool by owner; free + requests + tree = total."""

    name: str
    total_tokens: int
    free_tokens: int
    request_tokens: int
    tree_tokens: int
    evictable_tokens: int
