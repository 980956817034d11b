"""Fields that say how tokens are drawn and what is told about them: checked, with the value and the limit."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from srt.api.bodies import ChatBody, CompletionBody, GenerateBody, SharedSampling, invalid, shown
from srt.errors import ErrorCode, ServingError
from srt.messages import LogprobParams

MAX_N: Final = 128
MAX_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_NATIVE_TOP_LOGPROBS: Final = 128
MAX_LOGPROB_IDS: Final = 128
MAX_REGEXES: Final = 32
MAX_REGEX_BYTES: Final = 256
MAX_TIMEOUT_MS: Final = 24 * 3600 * 1000

V = TypeVar("V")


def copies(body: SharedSampling) -> int:
    """How many answers each prompt gets."""
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_N:
        raise invalid(f"'n' is {n}, it must be between 1 and {MAX_N}", "n")
    return n


def check_penalties(body: SharedSampling) -> None:
    """Raises: ServingError if one is out of range."""
    for name, value in (("frequency_penalty", body.frequency_penalty), ("presence_penalty", body.presence_penalty)):
        if value is not None and not -2 <= value <= 2:
            raise invalid(f"'{name}' is {value}, it must be between -2 and 2", name)
    repetition = body.repetition_penalty
    if repetition is not None and not 0 < repetition <= 2:
        raise invalid(f"'repetition_penalty' is {repetition}, it must be above 0 and at most 2", "repetition_penalty")


def logit_bias(given: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias, in order of id."""
    if not given:
        return ()
    if len(given) > MAX_BIASES:
        raise invalid(f"'logit_bias' has {len(given)} entries, the limit is {MAX_BIASES}", "logit_bias")
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(vocab_size)) and int(key) < vocab_size):
            text = f"'logit_bias' names the token {shown(key)}, token ids of this model are 0 to {vocab_size - 1}"
            raise invalid(text, "logit_bias")
        if not -100 <= bias <= 100:
            raise invalid(f"'logit_bias' of token {key} is {bias}, it must be between -100 and 100", "logit_bias")
        biases[int(key)] = bias
    return tuple(sorted(biases.items()))


def thinking_budget(body: SharedSampling, more: int | None, *, known: bool) -> int | None:
    """Most tokens of reasoning, under one of its names; `more` is one from elsewhere in the body. `known`: the server
    knows where reasoning ends."""
    names = ("max_thinking_tokens", "thinking_budget", "thinking_token_budget")
    values = (body.max_thinking_tokens, body.thinking_budget, body.thinking_token_budget)
    given = [(name, value) for name, value in (*zip(names, values, strict=True), (names[0], more)) if value is not None]
    if not given:
        return None
    name, budget = given[0]
    if len(given) > 1:
        raise invalid(f"'{name}' and '{given[1][0]}' are one thing under two names: send one of them", given[1][0])
    if not 0 <= budget < 1 << 31:
        raise invalid(f"'{name}' is {budget}, it must be between 0 and {(1 << 31) - 1}", name)
    if not known:
        text = f"'{name}' is not supported: the server knows no format of reasoning for this model (--reasoning-parser)"
        raise ServingError(ErrorCode.UNSUPPORTED_FIELD, text, name)
    return budget


def stop_regexes(given: str | list[str] | None) -> tuple[str, ...]:
    """Expressions that end an answer. Whether they are any is for the tokenizer to say."""
    match given:
        case None | "":
            return ()
        case str():
            patterns = [given]
        case list():
            patterns = given
    if len(patterns) > MAX_REGEXES:
        raise invalid(f"'stop_regex' has {len(patterns)} expressions, the limit is {MAX_REGEXES}", "stop_regex")
    for index, pattern in enumerate(patterns):
        size = len(pattern.encode())
        if not 0 < size <= MAX_REGEX_BYTES:
            limit = f"it must have 1 to {MAX_REGEX_BYTES}"
            raise invalid(f"'stop_regex[{index}]' has {size} bytes, {limit}", "stop_regex")
    return tuple(dict.fromkeys(patterns))


def timeout_ms(given: int | None) -> int | None:
    """How long a call may take."""
    if given is not None and not 1 <= given <= MAX_TIMEOUT_MS:
        raise invalid(f"'timeout_ms' is {given}, it must be between 1 and {MAX_TIMEOUT_MS}", "timeout_ms")
    return given


def chat_logprobs(body: ChatBody) -> LogprobParams | None:
    """What `logprobs` and `top_logprobs` of a chat ask for."""
    top = body.top_logprobs or 0
    _at_most(top, MAX_TOP_LOGPROBS, "top_logprobs")
    if top and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    return LogprobParams(top) if body.logprobs else None


def completion_logprobs(body: CompletionBody) -> LogprobParams | None:
    """What `logprobs` of a completion asks for; with `echo` of the prompt too."""
    if body.logprobs is None:
        return None
    _at_most(body.logprobs, MAX_TOP_LOGPROBS, "logprobs")
    return LogprobParams(body.logprobs, prompt_from=0 if body.echo else None)


def native_logprobs(body: GenerateBody, count: int, vocab_size: int) -> list[LogprobParams | None]:
    """What each prompt of /generate asks for."""
    wanted = _each(body.return_logprob, count, "return_logprob", default=False)
    starts = _each(body.logprob_start_len, count, "logprob_start_len", default=-1)
    tops = _each(body.top_logprobs_num, count, "top_logprobs_num", default=0)
    listed = _listed_ids(body.token_ids_logprob, count)
    found: list[LogprobParams | None] = []
    for wants, start, top, ids in zip(wanted, starts, tops, listed, strict=True):
        _at_most(top, min(MAX_NATIVE_TOP_LOGPROBS, vocab_size), "top_logprobs_num")
        if start < -1:
            raise invalid(f"'logprob_start_len' is {start}, it must be -1 or more", "logprob_start_len")
        _check_listed(ids, vocab_size)
        texts = body.return_text_in_logprobs or False
        found.append(LogprobParams(top, ids, start, texts) if wants else None)
    return found


def _each(given: V | list[V] | None, count: int, name: str, *, default: V) -> list[V]:
    """A value for each prompt, from one for all or a list of them."""
    match given:
        case None:
            return [default] * count
        case list() as values:
            if len(values) != count:
                raise invalid(f"'{name}' has {len(values)} entries for {count} prompts", name)
            return values
        case value:
            return [value] * count


def _listed_ids(given: list[int | list[int] | None] | None, count: int) -> list[tuple[int, ...]]:
    """`token_ids_logprob`: one list of ids for all prompts, or one for each."""
    if not given:
        return [()] * count
    flat = [entry for entry in given if isinstance(entry, int)]
    if len(flat) == len(given):
        return [tuple(flat)] * count
    if flat:
        raise invalid("'token_ids_logprob' mixes token ids and lists of them", "token_ids_logprob")
    lists: list[Any] = _each(given, count, "token_ids_logprob", default=None)
    return [tuple(entry or ()) for entry in lists]


def _check_listed(ids: tuple[int, ...], vocab_size: int) -> None:
    name = "token_ids_logprob"
    if len(ids) > MAX_LOGPROB_IDS:
        raise invalid(f"'{name}' has {len(ids)} entries, the limit is {MAX_LOGPROB_IDS}", name)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise invalid(f"'{name}' names the token {token}, token ids of this model are 0 to {vocab_size - 1}", name)


def _at_most(value: int, limit: int, name: str) -> None:
    if not 0 <= value <= limit:
        raise invalid(f"'{name}' is {value}, it must be between 0 and {limit}", name)
