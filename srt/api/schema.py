"""Bodies to requests: everything a client sent is checked here, with the value and the limit in the message.

What comes out is trusted by all later code. Only what needs the prompt's length is left to the tokenizer process.
"""

from __future__ import annotations

import math
from array import array
from typing import Any, Final, Literal, TypeVar

import msgspec

from srt.api.bodies import (
    ChatBody,
    CompletionBody,
    GenerateBody,
    Notice,
    OpenAIBody,
    SamplingBody,
    SharedSampling,
    invalid,
    shown,
)
from srt.api.chat import chat_prompt
from srt.api.constraints import native_constraint, openai_constraint
from srt.api.sampling import (
    chat_logprobs,
    check_penalties,
    completion_logprobs,
    copies,
    logit_bias,
    native_logprobs,
    stop_regexes,
    thinking_budget,
    timeout_ms,
)
from srt.api.tools import Choice, call_constraint, reading_of
from srt.errors import ErrorCode, ServingError
from srt.formats.answer import Reading
from srt.formats.description import Formats
from srt.messages import ChatPrompt, ImageSource, SamplingParams, TextPrompt, TokenPrompt

MAX_STOPS: Final = 32
MAX_STOP_CHARACTERS: Final = 256
MAX_STOP_IDS: Final = 256
MAX_RID_CHARACTERS: Final = 128
MAX_NAMESPACE_CHARACTERS: Final = 256

NATIVE_NEW_TOKENS: Final = 128
COMPLETION_NEW_TOKENS: Final = 16
"""Length of an answer where the client names none; a chat may then use all the room."""


_INT32: Final = (1 << 31) - 1
_INT64: Final = (1 << 63) - 1

Prompt = TextPrompt | TokenPrompt | ChatPrompt
V = TypeVar("V")


class Request(msgspec.Struct, frozen=True):
    """One call of a client, ready to run: a prompt, or a batch of them, each with its sampling."""

    kind: Literal["generate", "completion", "chat"]
    prompts: tuple[Prompt, ...]
    sampling: tuple[SamplingParams, ...]
    copies: int = 1
    """Answers to each prompt; those of one prompt follow one another."""
    name: str = ""
    """The caller's name for the whole call; empty: the server picks one."""
    images: list[tuple[ImageSource, ...]] = []
    """Images of each prompt; empty: no prompt has any, or they have been sent. They are large, and a call may run for
    long."""
    rids: tuple[str, ...] = ()
    """The caller's names, one an answer; empty: the server makes them from its own."""
    stream: bool = False
    batch: bool = False
    """There is, or may be, more than one answer."""
    namespace: str = ""
    speculative: bool = True
    timeout_ms: int | None = None
    """The call ends when so much time has passed since it came."""
    notices: tuple[Notice, ...] = ()
    limit_field: str = "max_new_tokens"
    """How the client calls the limit of new tokens."""
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    return_ids: bool = False
    """Token ids of prompt and answer go into the answer."""
    reading: Reading = Reading()
    """How the answers of a chat are to be read."""


class Schema:
    """Checks bodies against one server's vocabulary and limits."""

    def __init__(
        self, *, vocab_size: int, context_length: int, batch_limit: int, formats: Formats | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._batch_limit = batch_limit
        self._formats = formats or Formats()

    # --- one function an endpoint -----------------------------------------------------------------------

    def generate(self, body: GenerateBody, notices: tuple[Notice, ...]) -> Request:
        """Body of /generate."""
        prompts, batch = self._native_prompts(body)
        match body.sampling_params:
            case None:
                bodies = [SamplingBody()] * len(prompts)
            case list() as given:
                bodies = given
            case one:
                bodies = [one] * len(prompts)
        if len(bodies) != len(prompts):
            raise invalid(f"'sampling_params' has {len(bodies)} entries for {len(prompts)} prompts", "sampling_params")
        n = copies(bodies[0])
        if any(copies(entry) != n for entry in bodies):
            raise invalid("'n' must be the same in all 'sampling_params'", "n")
        self._check_answers(len(prompts), n)
        logprobs = native_logprobs(body, len(prompts), self._vocab_size)
        shared = bodies.count(bodies[0]) == len(bodies)
        thinks = body.require_reasoning or False
        budget = body.max_thinking_tokens
        sampling = [self._native_sampling(entry, budget, thinks=thinks) for entry in (bodies[:1] if shared else bodies)]
        if body.return_logprob:
            params = sampling * len(prompts) if shared else sampling
            sampling = [
                msgspec.structs.replace(entry, logprobs=wanted) for entry, wanted in zip(params, logprobs, strict=True)
            ]
            shared = False
        return Request(
            kind="generate",
            prompts=prompts,
            sampling=tuple(sampling * len(prompts) if shared else sampling),
            copies=n,
            name=body.rid if isinstance(body.rid, str) else "",
            rids=_native_rids(body.rid, len(prompts), n, batch=batch),
            stream=body.stream or False,
            batch=batch or n > 1,
            namespace=_namespace(body.cache_salt, body.extra_key),
            speculative=_speculative(body.speculative),
            timeout_ms=timeout_ms(body.timeout_ms),
            notices=notices,
            return_ids=body.return_prompt_token_ids or False,
            images=_native_images(body.image_data, len(prompts), batch=batch),
        )

    def completion(self, body: CompletionBody, notices: tuple[Notice, ...]) -> Request:
        """Body of /v1/completions."""
        prompts = self._completion_prompts(body.prompt)
        # With nothing to generate there is still the prompt to be told about.
        fewest = 0 if body.echo else 1
        params = self._openai_sampling(body, body.max_tokens, "max_tokens", usual=COMPLETION_NEW_TOKENS, fewest=fewest)
        constraint = openai_constraint(body, after_thinking=False)
        params = msgspec.structs.replace(params, logprobs=completion_logprobs(body), constraint=constraint)
        return self._openai_request(body, notices, "completion", prompts, params, "max_tokens", echo=body.echo or False)

    def chat(self, body: ChatBody, notices: tuple[Notice, ...]) -> Request:
        """Body of /v1/chat/completions."""
        limit, field = body.max_completion_tokens, "max_completion_tokens"
        if limit is None:
            limit, field = body.max_tokens, "max_tokens"
        params = self._openai_sampling(body, limit, field, usual=None)
        choice = Choice(body)
        asked = openai_constraint(body, after_thinking=True)
        constraint = call_constraint(body, choice, self._formats, asked) if choice.must_call else asked
        params = msgspec.structs.replace(params, logprobs=chat_logprobs(body), constraint=constraint)
        prompt, images = chat_prompt(body, choice)
        request = self._openai_request(body, notices, "chat", (prompt,), params, field)
        reading = reading_of(body, choice, self._formats)
        return msgspec.structs.replace(request, images=[images] if images else [], reading=reading)

    def token_lists(self, given: list[int | list[int]], name: str) -> tuple[list[bytes], bool]:
        """Packed ids of one list of tokens or of several, and whether there were several."""
        nested = sum(isinstance(entry, list) for entry in given)
        if nested == 0:
            return [self._packed(given, name)], False
        if nested != len(given):
            raise invalid(f"'{name}' mixes token ids and lists of them", name)
        return [self._packed(ids, f"{name}[{index}]") for index, ids in enumerate(given)], True

    # --- prompts ----------------------------------------------------------------------------------------

    def _native_prompts(self, body: GenerateBody) -> tuple[tuple[Prompt, ...], bool]:
        if (body.text is None) == (body.input_ids is None):
            found = "neither" if body.text is None else "both"
            raise invalid(f"exactly one of 'text' and 'input_ids' is required, got {found}", "text")
        if body.input_ids is not None:
            packed, batch = self.token_lists(body.input_ids, "input_ids")
            return self.batch([TokenPrompt(ids) for ids in packed], "input_ids"), batch
        match body.text:
            case list() as texts:
                return self.batch([_text(text, f"text[{index}]") for index, text in enumerate(texts)], "text"), True
            case text:
                assert text is not None
                return (_text(text, "text"),), False

    def _completion_prompts(self, given: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
        match given:
            case str(text):
                return (_text(text, "prompt"),)
            case [str(), *_]:
                prompts = [_text(text, f"prompt[{index}]") for index, text in enumerate(_all_texts(given))]
                return self.batch(prompts, "prompt")
            case _:
                packed, _nested = self.token_lists(_no_texts(given), "prompt")
                return self.batch([TokenPrompt(ids) for ids in packed], "prompt")

    def batch(self, prompts: list[V], name: str) -> tuple[V, ...]:
        """Prompts of one call, of which there must not be too many."""
        if not prompts:
            raise invalid(f"'{name}' is empty", name)
        if len(prompts) > self._batch_limit:
            raise invalid(f"'{name}' has {len(prompts)} prompts, the limit is {self._batch_limit}", name)
        return tuple(prompts)

    def _check_answers(self, prompts: int, n: int) -> None:
        """A call is admitted whole or not at all, so it must not ask for more than can wait."""
        if prompts * n > self._batch_limit:
            raise invalid(f"'n' is {n}, with {prompts} prompts; the limit is {self._batch_limit} answers a call", "n")

    def _packed(self, ids: Any, name: str) -> bytes:
        """Token ids of a prompt as int32 bytes, each inside the vocabulary."""
        if not ids:
            raise invalid(f"'{name}' is empty", name)
        if len(ids) > self._context_length:
            raise ServingError(
                ErrorCode.PROMPT_TOO_LONG,
                f"'{name}' has {len(ids)} tokens, the context length is {self._context_length} tokens",
                name,
            )
        self._check_ids(ids, name)
        return array("i", ids).tobytes()

    def _check_ids(self, ids: list[int], name: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self._vocab_size):
            index, found = next((at, token) for at, token in enumerate(ids) if not 0 <= token < self._vocab_size)
            raise invalid(
                f"'{name}[{index}]' is {found}, token ids of this model are 0 to {self._vocab_size - 1}", name
            )

    # --- sampling ---------------------------------------------------------------------------------------

    def _native_sampling(self, body: SamplingBody, budget: int | None, *, thinks: bool) -> SamplingParams:
        params = self._sampling(
            body,
            new_tokens=(body.max_new_tokens, "max_new_tokens", NATIVE_NEW_TOKENS),
            fewest=0,
            least_tokens=(body.min_new_tokens, "min_new_tokens"),
            seed=(body.sampling_seed, "sampling_seed"),
            no_stop_trim=body.no_stop_trim or False,
            budget=budget,
        )
        return msgspec.structs.replace(params, constraint=native_constraint(body, after_thinking=thinks))

    def _openai_sampling(
        self, body: OpenAIBody, limit: int | None, field: str, *, usual: int | None, fewest: int = 1
    ) -> SamplingParams:
        return self._sampling(
            body,
            new_tokens=(limit, field, usual),
            fewest=fewest,
            least_tokens=(body.min_tokens, "min_tokens"),
            seed=(body.seed, "seed"),
            no_stop_trim=body.no_stop_trim or body.include_stop_str_in_output or False,
        )

    def _sampling(
        self,
        body: SharedSampling,
        *,
        new_tokens: tuple[int | None, str, int | None],
        fewest: int,
        least_tokens: tuple[int | None, str],
        seed: tuple[int | None, str],
        no_stop_trim: bool,
        budget: int | None = None,
    ) -> SamplingParams:
        most, most_field, usual = new_tokens
        least, least_field = least_tokens
        _within(most, fewest, _INT32, most_field)
        _within(least, 0, _INT32, least_field)
        most_possible = usual if most is None else most
        if least is not None and most_possible is not None and least > most_possible:
            raise invalid(f"'{least_field}' is {least}, more than '{most_field}' which is {most_possible}", least_field)
        _within(seed[0], -_INT64 - 1, _INT64, seed[1])
        _within(body.top_k, -1, _INT32, "top_k")
        if body.temperature is not None and not 0 <= body.temperature < math.inf:
            raise invalid(f"'temperature' is {body.temperature}, it must be 0 or more", "temperature")
        if body.top_p is not None and not 0 < body.top_p <= 1:
            raise invalid(f"'top_p' is {body.top_p}, it must be above 0 and at most 1", "top_p")
        if body.min_p is not None and not 0 <= body.min_p <= 1:
            raise invalid(f"'min_p' is {body.min_p}, it must be between 0 and 1", "min_p")
        check_penalties(body)
        return SamplingParams(
            max_new_tokens=most,
            usual_new_tokens=usual,
            min_new_tokens=least or 0,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            seed=seed[0],
            stop=_stops(body.stop),
            stop_regexes=stop_regexes(body.stop_regex),
            stop_token_ids=self._stop_ids(body.stop_token_ids or []),
            ignore_eos=body.ignore_eos or False,
            skip_special_tokens=body.skip_special_tokens is not False,
            no_stop_trim=no_stop_trim,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            repetition_penalty=body.repetition_penalty,
            logit_bias=logit_bias(body.logit_bias, self._vocab_size),
            thinking_budget=thinking_budget(body, budget, known=self._formats.reasoning is not None),
        )

    def _stop_ids(self, ids: list[int]) -> tuple[int, ...]:
        if len(ids) > MAX_STOP_IDS:
            raise invalid(f"'stop_token_ids' has {len(ids)} entries, the limit is {MAX_STOP_IDS}", "stop_token_ids")
        self._check_ids(ids, "stop_token_ids")
        return tuple(ids)

    def _openai_request(
        self,
        body: OpenAIBody,
        notices: tuple[Notice, ...],
        kind: Literal["completion", "chat"],
        prompts: tuple[Prompt, ...],
        params: SamplingParams,
        limit_field: str,
        *,
        echo: bool = False,
    ) -> Request:
        options = body.stream_options
        if options is not None and not body.stream:
            raise invalid("'stream_options' needs 'stream': true", "stream_options")
        rid, rid_field = body.rid, "rid"
        if body.request_id is not None:
            if rid is not None:
                raise invalid("'rid' and 'request_id' are one thing under two names: send one of them", "request_id")
            rid, rid_field = body.request_id, "request_id"
        n = copies(body)
        self._check_answers(len(prompts), n)
        answers = len(prompts) * n
        return Request(
            kind=kind,
            prompts=prompts,
            sampling=(params,) * len(prompts),
            copies=n,
            name=rid or "",
            rids=_one_rid(rid, answers, batch=answers > 1, field=rid_field),
            stream=body.stream or False,
            batch=answers > 1,
            namespace=_namespace(body.cache_salt, body.extra_key),
            speculative=_speculative(body.speculative),
            timeout_ms=timeout_ms(body.timeout_ms),
            notices=notices,
            limit_field=limit_field,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            echo=echo,
            return_ids=body.return_token_ids or False,
        )


# --- single fields --------------------------------------------------------------------------------------


def _native_images(
    given: str | list[str | list[str] | None] | None, count: int, *, batch: bool
) -> list[tuple[ImageSource, ...]]:
    """`image_data`: one image or a list for one prompt; for a batch one entry a prompt, null where it has none."""
    match given:
        case None | [] | "":
            return []
        case str():
            entries: list[str | list[str] | None] = [given]
        case [str(), *_] if not batch:
            entries = [[image for image in given if isinstance(image, str)]]
            if len(entries[0] or ()) != len(given):
                raise invalid("'image_data' mixes images and lists of them", "image_data")
        case list():
            entries = given
    if len(entries) != count:
        raise invalid(f"'image_data' has {len(entries)} entries for {count} prompts", "image_data")
    images = [tuple(ImageSource(text) for text in _listed(entry)) for entry in entries]
    return images if any(images) else []


def _listed(entry: str | list[str] | None) -> list[str]:
    match entry:
        case None:
            return []
        case str():
            return [entry]
        case list():
            return entry


def _text(text: str, name: str) -> TextPrompt:
    if not text:
        raise invalid(f"'{name}' is empty", name)
    return TextPrompt(text)


def _all_texts(given: list[str | int | list[int]]) -> list[str]:
    texts = [entry for entry in given if isinstance(entry, str)]
    if len(texts) != len(given):
        raise invalid("'prompt' mixes texts and token ids", "prompt")
    return texts


def _no_texts(given: list[str | int | list[int]]) -> list[int | list[int]]:
    tokens = [entry for entry in given if not isinstance(entry, str)]
    if len(tokens) != len(given):
        raise invalid("'prompt' mixes texts and token ids", "prompt")
    return tokens


def _within(value: int | None, least: int, most: int, name: str) -> None:
    if value is not None and not least <= value <= most:
        raise invalid(f"'{name}' is {value}, it must be between {least} and {most}", name)


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    match given:
        case None:
            return ()
        case str():
            stops = [given]
        case list():
            stops = given
    if len(stops) > MAX_STOPS:
        raise invalid(f"'stop' has {len(stops)} texts, the limit is {MAX_STOPS}", "stop")
    for index, stop in enumerate(stops):
        if not stop:
            raise invalid(f"'stop[{index}]' is empty", "stop")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise invalid(f"'stop[{index}]' has {len(stop)} characters, the limit is {MAX_STOP_CHARACTERS}", "stop")
    return tuple(dict.fromkeys(stops))


def _namespace(salt: str | None, key: str | None) -> str:
    """One name for a pair of optional ones; no two pairs share it."""
    for name, value in (("cache_salt", salt), ("extra_key", key)):
        if value is not None and len(value) > MAX_NAMESPACE_CHARACTERS:
            raise invalid(f"'{name}' has {len(value)} characters, the limit is {MAX_NAMESPACE_CHARACTERS}", name)
    return f"{len(salt or '')}:{salt or ''}{key or ''}" if salt or key else ""


def _speculative(choice: str | None) -> bool:
    """Whether tokens may be guessed ahead for this call."""
    if choice not in (None, "auto", "off"):
        raise invalid(f"'speculative' is {shown(choice)}, it must be 'auto' or 'off'", "speculative")
    return choice != "off"


def _check_rid(rid: str, name: str) -> str:
    if not 1 <= len(rid) <= MAX_RID_CHARACTERS or not all("!" <= character <= "~" for character in rid):
        raise invalid(
            f"'{name}' is {shown(rid)}, it must have 1 to {MAX_RID_CHARACTERS} visible ASCII characters", name
        )
    return rid


def _one_rid(rid: str | None, count: int, *, batch: bool, field: str = "rid") -> tuple[str, ...]:
    """Names of a call's prompts from one name: itself, or for a batch a prefix."""
    if rid is None:
        return ()
    _check_rid(rid, field)
    return tuple(f"{rid}_{index}" for index in range(count)) if batch else (rid,)


def _native_rids(given: str | list[str] | None, count: int, n: int, *, batch: bool) -> tuple[str, ...]:
    match given:
        case list() as rids:
            pass
        case rid:
            return _one_rid(rid, count * n, batch=batch or n > 1)
    if len(rids) != count:
        raise invalid(f"'rid' has {len(rids)} entries for {count} prompts", "rid")
    for index, rid in enumerate(rids):
        _check_rid(rid, f"rid[{index}]")
    if len(set(rids)) != len(rids):
        twice = next(rid for rid in rids if rids.count(rid) > 1)
        raise ServingError(ErrorCode.DUPLICATE_REQUEST_ID, f"'rid' contains {shown(twice)} more than once", "rid")
    if n > 1:
        return tuple(f"{rid}_{copy}" for rid in rids for copy in range(n))
    return tuple(rids)
