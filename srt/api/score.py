"""`POST /v1/score`: how likely each of a few label tokens is to follow each of many prompts."""

from __future__ import annotations

import math
from typing import Any, Final

from srt.api.bodies import Notice, Parser, ScoreBody, invalid
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.logprobs import positions
from srt.api.openai import usage
from srt.api.schema import Prompt, Request
from srt.api.service import Service
from srt.api.tickets import Stream
from srt.errors import ErrorCode, ServingError
from srt.messages import LogprobParams, SamplingParams, TextPrompt, TokenPrompt

MAX_LABELS: Final = 128


class Score:
    """`/v1/score`: how likely each of a few tokens is to follow each of many prompts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.SCORE, ScoreBody)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call. One token is generated for each prompt, and its distribution is what is told."""
        service = self._service
        body, notices = await service.read(exchange, self._parser)
        model = service.model_named(body.model)
        request = self._request(body, notices)
        labels = tuple(body.label_token_ids)
        with service.serve(exchange, request, "score-") as ticket:
            await ticket.whole()
            scores = [_scores(stream, labels, softmax=body.apply_softmax or False) for stream in ticket.streams]
            answer: dict[str, Any] = {
                "object": "scoring",
                "model": model,
                "scores": scores,
                "usage": usage(ticket.streams),
            }
            if notices:
                answer["warnings"] = [notice.text for notice in notices]
            await exchange.respond_json(answer)

    def _request(self, body: ScoreBody, notices: tuple[Notice, ...]) -> Request:
        schema, labels = self._service.schema, body.label_token_ids
        if not 1 <= len(labels) <= MAX_LABELS:
            raise invalid(
                f"'label_token_ids' has {len(labels)} entries, it must have 1 to {MAX_LABELS}", "label_token_ids"
            )
        schema.token_lists(list(labels), "label_token_ids")
        params = SamplingParams(
            max_new_tokens=1, temperature=0.0, ignore_eos=True, logprobs=LogprobParams(ids=tuple(labels))
        )
        prompts = schema.batch(self._prompts(body), "items")
        return Request(kind="generate", prompts=prompts, sampling=(params,) * len(prompts), batch=True, notices=notices)

    def _prompts(self, body: ScoreBody) -> list[Prompt]:
        """Query and item in their order, for each item."""
        first = body.item_first or False
        match body.query, body.items:
            case str() as query, str() as item:
                return [_text(query, item, first)]
            case str() as query, list() as items if all(isinstance(item, str) for item in items):
                return [_text(query, str(item), first) for item in items]
            case list() as query, list() as items if all(isinstance(item, list) for item in items):
                joined: list[int | list[int]] = [[*item, *query] if first else [*query, *item] for item in items]
                packed, _ = self._service.schema.token_lists(joined, "items")
                return [TokenPrompt(ids) for ids in packed]
            case _:
                raise invalid("'query' and 'items' must both be texts, or both token ids", "items")


def _text(query: str, item: str, item_first: bool) -> TextPrompt:
    if not query and not item:
        raise invalid("'query' and one of 'items' are both empty", "items")
    return TextPrompt(item + query if item_first else query + item)


def _scores(stream: Stream, labels: tuple[int, ...], *, softmax: bool) -> list[float]:
    """Probabilities of the labels; with `softmax`, among the labels alone."""
    listed = [at.listed for part in stream.take_logprobs().output for at in positions(part, labels)]
    if not listed or listed[0] is None:
        raise ServingError(ErrorCode.ABORTED, "a prompt was aborted before it was computed")
    values = [value for value, _, _ in listed[0]]
    if not softmax:
        return [math.exp(value) for value in values]
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / sum(weights) for weight in weights]
