"""Log probabilities of one request on their way to the client: cut to what is shown, with the bytes of each token."""

from __future__ import annotations

from array import array
from itertools import chain
from math import nan

import msgspec

from srt.errors import ErrorCode, ServingError
from srt.messages import Emission, LogprobParams, Logprobs, LogprobSpec, joined
from srt.tokenizer.vocabulary import Vocabulary

BYTES_PER_ID = 4


def first_listed(params: LogprobParams, prompt_tokens: int) -> int | None:
    """The first position of the prompt that the answer lists.

    Raises: ServingError if the prompt is too short for it.
    """
    start = params.prompt_from
    if start is not None and start >= prompt_tokens:
        raise ServingError(
            ErrorCode.INVALID_REQUEST,
            f"'logprob_start_len' is {start}, it must be less than the prompt's {prompt_tokens} tokens",
            "logprob_start_len",
        )
    return prompt_tokens - 1 if start == -1 else start


def spec_of(params: LogprobParams, prompt_tokens: int) -> LogprobSpec:
    """What the worker has to find out. Raises: as `first_listed`."""
    first = first_listed(params, prompt_tokens)
    wanted = None if first is None or first + 1 >= prompt_tokens else first + 1
    return LogprobSpec(params.top, params.ids, wanted)


class Scores:
    """What has come and is not sent. The first listed position of the prompt has no numbers: nothing that was looked
    at stands before it."""

    __slots__ = ("_ids", "_output", "_prompt", "_texts", "_vocabulary")

    def __init__(self, params: LogprobParams, prompt_ids: bytes, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids, self._texts = params.ids, params.texts
        self._output: list[Logprobs] = []
        self._prompt: list[Logprobs] = []
        first = first_listed(params, len(prompt_ids) // BYTES_PER_ID)
        if first is not None:
            token = prompt_ids[BYTES_PER_ID * first : BYTES_PER_ID * (first + 1)]
            nothing = array("f", [nan])
            top_ids, top_values = bytes(BYTES_PER_ID * params.top), (nothing * params.top).tobytes()
            listed = (nothing * len(params.ids)).tobytes()
            self._prompt.append(Logprobs(token, nothing.tobytes(), top_ids, top_values, listed))

    def add(self, emission: Emission, count: int) -> None:
        """Take over what an emission brings, of its first `count` tokens."""
        if emission.prompt_logprobs is not None:
            self._prompt.append(emission.prompt_logprobs)
        if emission.logprobs is not None and count:
            self._output.append(emission.logprobs.head(count))

    def take(self) -> tuple[Logprobs | None, Logprobs | None]:
        """Of tokens and of the prompt, since the last time."""
        output, prompt = self._output, self._prompt
        self._output, self._prompt = [], []
        return self._finished(output), self._finished(prompt)

    def _finished(self, parts: list[Logprobs]) -> Logprobs | None:
        if not parts:
            return None
        whole = joined(parts)
        if not self._texts:
            return whole
        named = chain(memoryview(whole.token_ids).cast("i"), memoryview(whole.top_ids).cast("i"), self._ids)
        return msgspec.structs.replace(whole, texts=tuple(map(self._vocabulary.bytes_of, named)))
