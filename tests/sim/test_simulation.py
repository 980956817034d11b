"""Seeded storms over the real scheduler: every page accounted for, every request ended once, every answer right.

A failing seed is named in the test's id; `Storm(seed)` reproduces it exactly.
"""

from __future__ import annotations

import random

import pytest

from srt.messages import Failed, Finish, LogprobSpec
from tests.sim.fake_worker import VOCABULARY, answer
from tests.sim.world import Client, World
from tests.support.plans import runtime_plan

SEEDS = 80
STEPS = 1_600
"""80 × 1,600 = 128,000 steps."""

CHECK_EVERY = 20
"""Steps between two exhaustive checks; the cheap one runs after each."""


class Storm:
    """One seed: sizes, switches, and a random order of arrivals, cancels, stops and results."""

    def __init__(self, seed: int, drafts: int = 0, modules: int = 0) -> None:
        self.rng = rng = random.Random(seed)
        page_size = (1, 16, 64, 4)[seed % 4]
        self.window = rng.choice((1, 3, page_size, 2 * page_size + 3, 40))
        self.longest = rng.choice((24, 60)) if page_size < 16 else rng.choice((70, 200))
        window_pages = -(-(self.window - 1) // page_size)
        most_pages = -(-self.longest // page_size)
        self.plan = runtime_plan(
            page_size=page_size,
            window=self.window,
            full_pages=most_pages + rng.choice((0, 1, *[most_pages] * 4, 6 * most_pages)),
            sliding_pages=window_pages + rng.choice((1, 2, window_pages + 2, *[8 * (window_pages + 2)] * 3)),
            rows=rng.choice((1, 4, 8)),
            queued=rng.choice((2, 8, 32)),
            chunk=rng.choice((1, 5, 16, 64)),
            context=self.longest,
            overlap=(seed // 4) % 2 == 0,
            radix=(seed // 8) % 4 != 3,
            policy=rng.choice(("fcfs", "lpm")),
            drafts=drafts,
            modules=modules,
            draft_pages=-(-(self.window + modules - 2) // page_size) + rng.choice((1, 2, window_pages + 2, 40)),
        )
        self.world = World(self.plan)
        self.bases = [[rng.randrange(VOCABULARY) for _ in range(self.longest)] for _ in range(3)]
        self.ended: list[Client] = []
        self.told = 0
        """Requests that heard log probabilities."""
        self.longest_prompt = rng.choice((self.longest // 4, self.longest))
        self.careless = rng.random() < 0.6
        self.busy = rng.choice((0.01, 0.05, 0.2))

    def prompt(self) -> list[int]:
        """Often a prefix of something known, an earlier prompt with its answer, or both with a tail."""
        rng = self.rng
        if self.ended and rng.random() < 0.4:
            earlier = rng.choice(self.ended[-8:])
            known = earlier.prompt + earlier.output
        else:
            known = rng.choice(self.bases)
        tail = [rng.randrange(VOCABULARY) for _ in range(rng.choice((0, 0, 1, 5)))]
        return (known[: rng.randint(0, self.longest_prompt)] + tail)[: self.longest - 1] or [0]

    def arrive(self) -> None:
        """One request, or several that are alike."""
        rng, prompt = self.rng, self.prompt()
        for _ in range(rng.choice((1, 1, 1, 3))):
            stop_ids = rng.sample(range(VOCABULARY), rng.choice((0, 0, 0, 1, 6)))
            new_tokens = rng.choice((0, 1, 2, 8, *[self.longest] * 3))
            namespace = rng.choice(("", "", "", "salt"))
            self.world.send(prompt, new_tokens, stop_ids, namespace, logprobs=self.wanted_logprobs(prompt))

    def wanted_logprobs(self, prompt: list[int]) -> LogprobSpec | None:
        """Every fourth request wants to hear of its answer, most of those of a part of the prompt too."""
        number = self.world.sent
        first = 1 + number // 4 % len(prompt)
        return None if number % 4 else LogprobSpec(prompt_from=first if first < len(prompt) else None)

    def act(self) -> None:
        """Whatever happens next."""
        rng, world = self.rng, self.world
        if self.careless:
            world.scheduler.state.share = 0.0  # expect no answers, so that pages run out
        dice = rng.random()
        if dice < self.busy or not world.live:
            self.arrive()
        elif dice < 1.15 * self.busy:
            world.abort(world.clients[rng.choice(world.live)])
        elif dice < 1.3 * self.busy:
            world.stop_matched(world.clients[rng.choice(world.live)])
        elif not world.deliver():
            world.turn()
            assert world.results or not world.live, f"stuck with {world.live}"

    def collect(self) -> None:
        """Judge the requests that have ended, and forget them."""
        for rid in [rid for rid, client in self.world.clients.items() if client.ending is not None]:
            client = self.world.clients.pop(rid)
            self.judge(client)
            self.ended.append(client)
        del self.ended[:-8]

    def judge_logprobs(self, client: Client) -> None:
        """Each position that is wanted was told of once, in order, up to where the answer ends."""
        first = client.told_from
        if first is None:
            assert not client.told
            return
        tokens = client.prompt + client.output
        assert client.told == list(enumerate(tokens))[first : first + len(client.told)]
        if client.told:
            assert client.cached_tokens < first
            self.told += 1
        if client.output:
            assert first + len(client.told) == len(tokens)

    def judge(self, client: Client) -> None:
        """Whatever a client got is what the model says when it is alone; a whole answer ends where it should."""
        room = min(client.max_new_tokens, self.longest - len(client.prompt))
        whole = answer(client.prompt, room, self.window)
        cut = next((i + 1 for i, token in enumerate(whole) if token in client.stop_ids), len(whole))
        assert client.output == whole[: len(client.output)], f"{client.rid}: {client.output} is not of {whole}"
        assert len(client.output) <= cut
        assert 0 <= client.cached_tokens < len(client.prompt)
        self.judge_logprobs(client)
        match client.ending:
            case Finish(kind="stop", matched=int(matched)):
                assert len(client.output) == cut and matched == client.output[-1]
            case Finish(kind="length"):
                assert len(client.output) == len(whole)
            case Failed(code=code):
                assert code in ("queue_full", "exceeds_kv_capacity") and not client.output
            case Finish():
                pass
            case None:
                raise AssertionError(f"{client.rid} has not ended")


def run_storm(storm: Storm, steps: int) -> None:
    """Act until so many steps are done; then let everything end."""
    world, state = storm.world, storm.world.scheduler.state
    checked = 0
    while state.totals.steps < steps:
        storm.act()
        assert state.cache.leaked() == 0
        if state.totals.steps >= checked + CHECK_EVERY:
            checked = state.totals.steps
            state.cache.check()
            storm.collect()
    world.run()
    state.cache.check()
    storm.collect()
    assert storm.told
    for group in range(len(state.cache.groups)):
        usage = state.cache.usage(group)
        assert usage.requests == 0
        assert usage.free + usage.tree == usage.total
    state.cache.flush()
    assert all(pool.free == pool.total for pool in state.cache.pools)
    assert not state.cache.tree.roots and not state.cache.promises


DRAFT_SEEDS = 32
DRAFT_STEPS = 800


@pytest.mark.parametrize("luck", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(DRAFT_SEEDS))
def test_07_22_23_26_guesses_right_or_wrong_lose_no_page_and_change_no_answer(seed: int, luck: float) -> None:
    drafts = (1, 2, 3, 7)[seed % 4]
    storm = Storm(1000 + seed, drafts, modules=drafts if seed // 4 % 2 else 0)
    storm.world.worker.luck = luck
    run_storm(storm, DRAFT_STEPS)
    worker = storm.world.worker
    assert worker.guesses
    assert luck < 1.0 or worker.right_guesses == worker.guesses


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_storm_loses_a_page_or_a_request_or_changes_an_answer(seed: int) -> None:
    run_storm(Storm(seed), STEPS)
