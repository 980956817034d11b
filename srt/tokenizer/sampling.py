"""What a client asked for, completed by what the checkpoint says, as the scheduler and the worker need it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from srt.errors import ErrorCode, ServingError, StartupError
from srt.messages import SamplingParams, SamplingSpec, StopSpec
from srt.tokenizer.logprobs import spec_of

GREEDY_BELOW: Final = 1e-6
"""Temperatures under it are greedy: dividing logits by so little leaves only the largest one."""

_SEED_MASK: Final = (1 << 63) - 1


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What holds where a request says nothing: generation_config.json, then the neutral value."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] = 1.0

    @classmethod
    def of(cls, generation_config: Mapping[str, Any]) -> SamplingDefaults:
        """Defaults of a checkpoint.

        Raises: StartupError if a value is outside what a request may say.
        """
        known = {name: generation_config.get(name) for name in cls.__struct_fields__}
        try:
            return msgspec.convert({name: value for name, value in known.items() if value is not None}, cls)
        except msgspec.ValidationError as error:
            raise StartupError(f"generation_config.json: {error}") from error


class SamplingResolver:
    """Turns `SamplingParams` into specs; requests without a seed draw theirs from `random_seed`, in order."""

    def __init__(
        self, defaults: SamplingDefaults, eos_token_ids: tuple[int, ...], context_length: int, random_seed: int
    ) -> None:
        self._defaults = defaults
        self._eos_token_ids = eos_token_ids
        self._context_length = context_length
        self._seeds = random.Random(random_seed)

    def resolve(self, params: SamplingParams, prompt_tokens: int) -> tuple[SamplingSpec, StopSpec]:
        """Specs of one request. Raises: ServingError if prompt and answer do not fit into the context."""
        ends = params.stop_token_ids if params.ignore_eos else (*self._eos_token_ids, *params.stop_token_ids)
        stop = StopSpec(
            max_new_tokens=self._max_new_tokens(params, prompt_tokens),
            token_ids=tuple(dict.fromkeys(ends)),
            texts=params.stop,
            regexes=params.stop_regexes,
            keep_text=params.no_stop_trim,
        )
        defaults = self._defaults
        temperature = defaults.temperature if params.temperature is None else params.temperature
        top_k = defaults.top_k if params.top_k is None else params.top_k
        repetition = params.repetition_penalty
        repetition = defaults.repetition_penalty if repetition is None else repetition
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed & _SEED_MASK
        sampling = SamplingSpec(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=max(top_k, 0),
            top_p=defaults.top_p if params.top_p is None else params.top_p,
            min_p=defaults.min_p if params.min_p is None else params.min_p,
            seed=seed,
            min_new_tokens=params.min_new_tokens,
            suppressed_ids=stop.token_ids if params.min_new_tokens else (),
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            repetition_penalty=repetition,
            logit_bias=params.logit_bias,
            logprobs=None if params.logprobs is None else spec_of(params.logprobs, prompt_tokens),
        )
        return sampling, stop

    def _max_new_tokens(self, params: SamplingParams, prompt_tokens: int) -> int:
        limit = self._context_length
        room = limit - prompt_tokens
        wanted = params.max_new_tokens
        if room < (0 if wanted == 0 else 1):
            raise ServingError(
                ErrorCode.PROMPT_TOO_LONG,
                f"the prompt has {prompt_tokens} tokens; the context length is {limit} tokens, of which at least 1 "
                "must be left for the answer",
                "prompt",
            )
        if wanted is None:
            return room if params.usual_new_tokens is None else min(params.usual_new_tokens, room)
        if wanted > room:
            raise ServingError(
                ErrorCode.PROMPT_TOO_LONG,
                f"{wanted} new tokens after a prompt of {prompt_tokens} tokens make {wanted + prompt_tokens}; the "
                f"context length is {limit} tokens",
                "max_new_tokens",
            )
        return wanted
