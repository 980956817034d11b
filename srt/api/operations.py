"""For operators: which version runs, how loaded it is, and what its workers spend their time on."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any, Final

from srt import __version__
from srt.api.bodies import Notice, Parser, ProfileBody, invalid, shown
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.service import Service
from srt.errors import ErrorCode, ServingError

MAX_PROFILE_STEPS: Final = 10_000
"""A recording ends after so many steps at the latest: it is held in memory until then."""

ACTIVITIES: Final = ("CPU", "GPU")


class Operations:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._profile = Parser(Body.PROFILE, ProfileBody)

    async def version(self, exchange: Exchange) -> None:
        """`/version`: the version of this server."""
        await exchange.respond_json({"version": __version__})

    async def loads(self, exchange: Exchange) -> None:
        """`/v1/loads`: what routers ask for, from the scheduler's last report. There is one replica."""
        load = self._load()
        summed = ("num_running_reqs", "num_waiting_reqs", "num_total_reqs", "num_used_tokens", "gen_throughput")
        await exchange.respond_json(
            {
                "timestamp": time.time(),
                "version": __version__,
                "dp_rank_count": 1,
                "loads": [load],
                "aggregate": {f"total_{name.removeprefix('num_')}": load[name] for name in summed}
                | {"avg_token_usage": load["token_usage"]},
            }
        )

    def _load(self) -> dict[str, Any]:
        plan, stats = self._service.plan, self._service.metrics.stats
        running = 0 if stats is None else stats.running
        waiting = 0 if stats is None else stats.queued
        used = 0 if stats is None else max((pool.request_tokens for pool in stats.groups), default=0)
        queries = 0 if stats is None else stats.cache_queries_tokens
        return {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "num_used_tokens": used,
            "max_total_num_tokens": plan.max_total_tokens,
            "max_running_requests": plan.max_running_requests,
            "max_queued_requests": plan.max_queued_requests,
            "token_usage": round(used / plan.max_total_tokens, 6),
            "gen_throughput": 0.0 if stats is None else stats.gen_throughput,
            "cache_hit_rate": stats.cache_hit_tokens / queries if stats is not None and queries else 0.0,
            "utilization": round(running / plan.max_running_requests, 6),
        }

    async def start_profile(self, exchange: Exchange) -> None:
        """`/start_profile`: every worker records its steps with torch's profiler."""
        service = self._service
        body, notices = await self._read(exchange)
        directory = self._directory(body.output_dir)
        steps = MAX_PROFILE_STEPS if body.num_steps is None else body.num_steps
        if not 1 <= steps <= MAX_PROFILE_STEPS:
            raise invalid(f"'num_steps' is {steps}, it must be between 1 and {MAX_PROFILE_STEPS}", "num_steps")
        activities = list(ACTIVITIES) if body.activities is None else body.activities
        unknown = [name for name in activities if name not in ACTIVITIES]
        if unknown or not activities:
            raise invalid(f"'activities' is {shown(activities)}, they are CPU and GPU", "activities")
        name = body.profile_prefix or "profile"
        if not name.replace("-", "").replace("_", "").isalnum() or len(name) > 64:
            raise invalid(f"'profile_prefix' is {shown(name)}, it must be at most 64 letters, digits, - and _", "")
        done = await service.calls.start_profile(
            directory / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
            steps,
            cpu="CPU" in activities,
            device="GPU" in activities,
            with_stack=body.with_stack or False,
            record_shapes=body.record_shapes or False,
        )
        await self._tell(exchange, done.ok, done.text, notices)

    async def stop_profile(self, exchange: Exchange) -> None:
        """`/stop_profile`: the recording ends, and its files are written before the answer."""
        self._service.check_alive()
        done = await self._service.calls.stop_profile()
        await self._tell(exchange, done.ok, done.text, ())

    async def _read(self, exchange: Exchange) -> tuple[Any, tuple[Notice, ...]]:
        """The body, which may be left out."""
        if exchange.headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in exchange.headers:
            self._service.check_alive()
            return ProfileBody(), ()
        return await self._service.read(exchange, self._profile)

    def _directory(self, asked: str | None) -> Path:
        """Where files go. Raises: ServingError if the operator has not allowed files there."""
        allowed = self._service.plan.server.profile_dir
        if allowed is None:
            raise ServingError(ErrorCode.UNSUPPORTED_FIELD, "profiles need a server with --profile-dir DIR")
        root = Path(allowed).resolve()
        chosen = root if asked is None else (root / asked).resolve()
        if not chosen.is_relative_to(root):
            raise invalid(f"'output_dir' is {shown(asked)}, it must be inside --profile-dir {root}", "output_dir")
        return chosen

    @staticmethod
    async def _tell(exchange: Exchange, ok: bool, text: str, notices: tuple[Notice, ...]) -> None:
        if not ok:
            raise ServingError(ErrorCode.INVALID_REQUEST, text)
        answer: dict[str, Any] = {"status": "ok", "files": text.splitlines()}
        if notices:
            answer["warnings"] = [notice.text for notice in notices]
        await exchange.respond_json(answer)
