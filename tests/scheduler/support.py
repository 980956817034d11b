"""The scheduler with its worker under the test's thumb."""

from __future__ import annotations

from typing import Any

from srt.messages import StepPlan
from srt.scheduler.request import Phase, Request
from tests.sim.world import Client, World
from tests.support.plans import runtime_plan


def world(**sizes: Any) -> World:
    """A world that keeps its step plans."""
    made = World(runtime_plan(**sizes))
    made.keep_steps = True
    return made


def request_of(inside: World, client: Client) -> Request:
    """The scheduler's view of a live request."""
    return inside.scheduler.state.live[client.rid]


def phase_of(inside: World, client: Client) -> Phase:
    """Its phase."""
    return request_of(inside, client).phase


def last_step(inside: World) -> StepPlan:
    """The plan that was sent last."""
    return inside.steps[-1]


def held(inside: World) -> list[int]:
    """Pages that requests hold, per group."""
    return [inside.scheduler.state.cache.usage(group).requests for group in range(2)]
