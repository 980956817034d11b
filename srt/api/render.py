"""`POST /v1/chat/completions/render`: what a chat completion with this body would be asked, without asking."""

from __future__ import annotations

from typing import Any

from srt.api.bodies import ChatBody, Parser
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.schema import Request
from srt.api.service import Service


class Render:
    """`/v1/chat/completions/render`: the prompt that a chat with this body would have, as text and as token ids."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = Parser(Body.CHAT, ChatBody)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        service = self._service
        request = await self._parsed(exchange)
        packed = await service.calls.tokenize(request.prompts[0], request.images[0] if request.images else ())
        answer: dict[str, Any] = {
            "object": "chat.completion.render",
            "model": service.model,
            "prompt": await service.calls.detokenize(packed, skip_special_tokens=False),
            "token_ids": memoryview(packed).cast("i").tolist(),
            "count": len(packed) // 4,
            "max_model_len": service.plan.context_length,
        }
        if request.notices:
            answer["warnings"] = [notice.text for notice in request.notices]
        await exchange.respond_json(answer)

    async def _parsed(self, exchange: Exchange) -> Request:
        body, notices = await self._service.read(exchange, self._parser)
        self._service.model_named(body.model)
        return self._service.schema.chat(body, notices)
