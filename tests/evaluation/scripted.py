"""An HTTP server that answers chats as it was told to: the shapes that servers of other versions answer with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from srt.evaluation.ask import Answers, Questions, ask_all


@dataclass
class Scripted:
    """`answer` maps the body of a chat to a whole answer, or to the lines of a stream; bodies are kept."""

    answer: Callable[[dict[str, Any]], dict[str, Any] | list[str]]
    sees_images: bool = False
    status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"served_model_name": "scripted", "has_image_understanding": self.sees_images})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        match self.answer(body):
            case dict() as whole:
                return web.json_response(whole, status=self.status)
            case lines:
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                for line in lines:
                    await response.write(f"data: {line}\n\n".encode())
                return response

    async def ask(self, *families: str, **options: Any) -> Answers:
        """Listen, and be asked these families."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/model_info", self._info)
        app.router.add_post("/v1/chat/completions", self._chat)
        async with TestServer(app) as server:
            return await ask_all(Questions(str(server.make_url("/")), families, **options), quiet=True)


def whole(message: dict[str, Any], finish: str = "stop", **usage: int) -> dict[str, Any]:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": 12, **usage}}


def event(delta: dict[str, Any], finish: str | None = None) -> str:
    """One event of a streamed chat completion."""
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
