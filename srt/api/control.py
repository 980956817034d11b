"""Everything that is not generation: signs of life, facts about the model, tokens, cache, aborts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec

from srt import __version__
from srt.api.auth import Access, Doorkeeper, offered_keys
from srt.api.bodies import NO_VALUE, AbortBody, DetokenizeBody, Parser, TokenizeBody, invalid, shown
from srt.api.chat import chat_prompt
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.metrics import CONTENT_TYPE, Exposition
from srt.api.native import WEIGHT_VERSION
from srt.api.schema import Request
from srt.api.service import Life, Service
from srt.api.tools import Choice
from srt.errors import ErrorCode, ServingError
from srt.heartbeat import LATE_S, Age
from srt.messages import ChatPrompt, ImageSource, SamplingParams, TextPrompt, TokenPrompt

HEALTH_GENERATE_S: Final = 20.0
"""How long `/health_generate` waits for its token."""

FLUSH_RETRY_S: Final = 0.05
MAX_FLUSH_WAIT_S: Final = 600.0
PLAIN: Final = [(b"content-type", b"text/plain; charset=utf-8")]


class Health:
    """Signs of life: read, never generated, except by `/health_generate`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def late(self, ages: list[Age]) -> list[str]:
        """Processes that are silent, or in one step for longer than the watchdog allows."""
        longest_step_s = self._service.plan.server.watchdog_timeout
        return [
            age.name
            for age in ages
            if age.beat_s is None or age.beat_s > LATE_S or (age.step_s is not None and age.step_s > longest_step_s)
        ]

    async def health(self, exchange: Exchange) -> None:
        """200 if every process is alive, else 503 with the names of those that are not."""
        ages = self._service.board.ages()
        late = self.late(ages)
        body = {
            "status": "late" if late else "ok",
            "late": late,
            "processes": [
                {"name": age.name, "beat_s": age.beat_s, "step": age.step, "step_s": age.step_s} for age in ages
            ],
        }
        await exchange.respond_json(body, 503 if late else 200)

    async def ready(self, exchange: Exchange) -> None:
        """200 between loading and draining, while every process is alive."""
        life = self._service.life
        late = self.late(self._service.board.ages()) if life is Life.SERVING else []
        ready = life is Life.SERVING and not late
        await exchange.respond_json({"ready": ready, "state": life.name.lower(), "late": late}, 200 if ready else 503)

    async def health_generate(self, exchange: Exchange) -> None:
        """200 if one token can be generated, else 503; the request is cancelled when it takes too long."""
        service = self._service
        service.check_alive()
        prompt = TokenPrompt((service.plan.model.bos_token_id or 0).to_bytes(4, "little"))
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        request = Request(kind="generate", prompts=(prompt,), sampling=(params,))
        started = time.perf_counter()
        with service.serve(exchange, request) as ticket:
            try:
                async with asyncio.timeout(HEALTH_GENERATE_S):
                    await ticket.whole()
            except TimeoutError as error:
                raise ServingError(ErrorCode.NOT_READY, f"no token within {HEALTH_GENERATE_S:.0f} s") from error
        await exchange.respond_json({"status": "ok", "seconds": round(time.perf_counter() - started, 6)})


class Facts:
    """What this server is and how it does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._exposition = Exposition(service.metrics, service.plan, service.model)

    async def model_info(self, exchange: Exchange) -> None:
        """`/model_info`: what the model is and can do."""
        plan = self._service.plan
        await exchange.respond_json(
            {
                "model_path": plan.server.model_path,
                "served_model_name": self._service.model,
                "tokenizer_path": plan.server.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": WEIGHT_VERSION,
                "load_format": plan.server.load_format,
                "reasoning_parser": None,
                "tool_call_parser": None,
                "disaggregation_mode": "null",
                "has_image_understanding": plan.model.has_vision,
                "has_audio_understanding": False,
                "model_type": plan.model.model_type,
                "architectures": [plan.model.architecture],
            }
        )

    async def server_info(self, exchange: Exchange) -> None:
        """`/server_info`: the resolved plan and the live state, no secrets (a plan holds none)."""
        service, plan = self._service, self._service.plan
        stats = service.metrics.stats
        resolved: dict[str, Any] = msgspec.to_builtins(plan)
        server = resolved.pop("server")
        state = {} if stats is None else msgspec.to_builtins(stats)
        state.pop("type", None)
        body = server | {
            "served_model_name": service.model,
            "version": __version__,
            "status": service.life.name.lower(),
            "startup_time": service.metrics.startup_s,
            "launch_command": launch_command(plan.server),
            "max_total_num_tokens": plan.max_total_tokens,
            "max_req_input_len": plan.context_length - 1,
            "plan": resolved,
            "internal_states": [state],
        }
        await exchange.respond_json(body)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._service.model,
            "object": "model",
            "created": int(self._service.started_at),
            "owned_by": "srt",
            "root": self._service.plan.server.model_path,
            "parent": None,
            "max_model_len": self._service.plan.context_length,
        }

    async def models(self, exchange: Exchange) -> None:
        """`/v1/models`: the models that are served, which is one."""
        await exchange.respond_json({"object": "list", "data": [self._card()]})

    async def model(self, exchange: Exchange) -> None:
        """`/v1/models/{id}`: the model, if it is served under this name."""
        self._service.model_named(exchange.scope["path_params"]["model"])
        await exchange.respond_json(self._card())

    async def metrics(self, exchange: Exchange) -> None:
        """`/metrics`: counters and gauges of all processes, for Prometheus."""
        text = self._exposition.text(self._service.board.ages())
        await exchange.respond(text, headers=[(b"content-type", CONTENT_TYPE.encode())])


def launch_command(server: msgspec.Struct) -> str:
    """A command line with the same options."""
    words = ["server launch"]
    for field in msgspec.structs.fields(server):
        value, default = msgspec.to_builtins(server)[field.name], field.default
        if value == default or value is False:
            continue
        flag = "--" + field.name.replace("_", "-")
        words.append(flag if value is True else f"{flag} {json.dumps(value) if ' ' in str(value) else value}")
    return " ".join(words)


class Tokens:
    """Text to ids and back, exactly as requests are served."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tokenize = Parser(Body.TOKENIZE, TokenizeBody)
        self._detokenize = Parser(Body.DETOKENIZE, DetokenizeBody)

    async def tokenize(self, exchange: Exchange) -> None:
        """`/tokenize`: a prompt, a list of them, or chat messages."""
        service = self._service
        body, notices = await service.read(exchange, self._tokenize)
        service.model_named(body.model)
        packed = [await service.calls.tokenize(prompt, images) for prompt, images in self._prompts(body)]
        lists = [memoryview(ids).cast("i").tolist() for ids in packed]
        counts = list(map(len, lists))
        one = not isinstance(body.prompt, list)
        answer: dict[str, Any] = {
            "tokens": lists[0] if one else lists,
            "count": counts[0] if one else counts,
            "max_model_len": service.plan.context_length,
        }
        if notices:
            answer["warnings"] = [notice.text for notice in notices]
        await exchange.respond_json(answer)

    @staticmethod
    def _prompts(body: TokenizeBody) -> list[tuple[TextPrompt | ChatPrompt, tuple[ImageSource, ...]]]:
        has_messages = bytes(body.messages) != b"null"
        if (body.prompt is None) != has_messages:
            found = "both" if has_messages else "neither"
            raise invalid(f"exactly one of 'prompt' and 'messages' is required, got {found}", "prompt")
        for name, value in _of_the_other_form(body, has_messages):
            if value is not None and value != NO_VALUE:
                forms = ("prompt", "messages") if has_messages else ("messages", "prompt")
                raise invalid(f"'{name}' goes with '{forms[0]}', not with '{forms[1]}'", name)
        if has_messages:
            return [chat_prompt(body, Choice(body))]
        special = body.add_special_tokens is not False
        match body.prompt:
            case list() as texts:
                pass
            case text:
                texts = [text or ""]
        if not texts or not all(texts):
            raise invalid("'prompt' is empty", "prompt")
        return [(TextPrompt(text, special), ()) for text in texts]

    async def detokenize(self, exchange: Exchange) -> None:
        """`/detokenize`: ids, or a list of such lists."""
        service = self._service
        body, notices = await service.read(exchange, self._detokenize)
        service.model_named(body.model)
        packed, nested = service.schema.token_lists(body.tokens, "tokens")
        skip = body.skip_special_tokens is not False
        texts = [await service.calls.detokenize(ids, skip_special_tokens=skip) for ids in packed]
        answer: dict[str, Any] = {"text": texts if nested else texts[0], "prompt": texts if nested else texts[0]}
        if notices:
            answer["warnings"] = [notice.text for notice in notices]
        await exchange.respond_json(answer)


def _of_the_other_form(body: TokenizeBody, has_messages: bool) -> list[tuple[str, object]]:
    """Fields that say nothing about what is to be tokenized, with their values."""
    if has_messages:
        return [("add_special_tokens", body.add_special_tokens or None)]
    return [
        ("tools", body.tools),
        ("tool_choice", body.tool_choice),
        ("reasoning_effort", body.reasoning_effort),
        ("chat_template_kwargs", body.chat_template_kwargs),
        ("add_generation_prompt", body.add_generation_prompt),
        ("continue_final_message", body.continue_final_message),
    ]


class Administration:
    """What changes the server's state."""

    def __init__(self, service: Service, doorkeeper: Doorkeeper) -> None:
        self._service = service
        self._doorkeeper = doorkeeper
        self._abort = Parser(Body.ABORT, AbortBody)

    async def flush_cache(self, exchange: Exchange) -> None:
        """`/flush_cache?timeout=s`: 200 when every cached prefix is gone, 400 if requests are running."""
        self._service.check_alive()
        deadline = time.perf_counter() + _seconds(exchange, "timeout")
        while True:
            done = await self._service.calls.flush_cache()
            if done.ok or time.perf_counter() >= deadline:
                break
            await asyncio.sleep(FLUSH_RETRY_S)
        text = done.text or ("the cache is empty" if done.ok else "requests are running")
        await exchange.respond(text.encode() + b"\n", 200 if done.ok else 400, PLAIN)

    async def abort_request(self, exchange: Exchange) -> None:
        """`/abort_request`: end the request of exactly this id, or with the admin key all of them."""
        raw = await exchange.body(self._service.plan.server.max_body_bytes)
        body, notices = self._abort.parse(raw, strict=exchange.headers.get(b"x-strict") == b"1")
        if body.abort_all:
            self._doorkeeper.check(Access.ADMIN, offered_keys(exchange.scope["headers"]))
            await self._service.calls.abort_all()
        elif body.rid:
            self._service.streams.abort(body.rid, body.abort_message)
        else:
            raise invalid("'rid' is required, or 'abort_all': true", "rid")
        answer: dict[str, Any] = {"status": "ok"}
        if notices:
            answer["warnings"] = [notice.text for notice in notices]
        await exchange.respond_json(answer)


def _seconds(exchange: Exchange, name: str) -> float:
    """A duration in the query string; 0 if it is not there."""
    values = parse_qs(exchange.scope["query_string"].decode("latin-1")).get(name)
    if not values:
        return 0.0
    try:
        seconds = float(values[-1])
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_FLUSH_WAIT_S:
        raise invalid(f"'{name}' is {shown(values[-1])}, it must be 0 to {MAX_FLUSH_WAIT_S:.0f} seconds", name)
    return seconds
