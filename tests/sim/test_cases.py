"""What users notice: sharing among siblings, exact `cached_tokens`, equal answers after retraction, long prompts."""

from __future__ import annotations

import random

import pytest

from tests.sim.fake_worker import answer
from tests.sim.world import Client, World
from tests.support.plans import runtime_plan


@pytest.mark.parametrize("overlap", [True, False])
def test_sixty_four_equal_prompts_that_arrive_together_cost_one_prefill(overlap: bool) -> None:
    inside = World(runtime_plan(page_size=16, window=32, full_pages=900, rows=64, chunk=64, overlap=overlap))
    prompt = [number % 40 for number in range(500)]
    clients = inside.send_all([prompt] * 64, 3)
    inside.run()
    whole = answer(prompt, 3, 32)
    assert all(client.output == whole for client in clients)
    assert [client.cached_tokens for client in clients] == [0] + [496] * 63
    assert inside.worker.computed_tokens == 500 + 63 * 4 + 64 * 2


def test_siblings_wait_only_for_what_they_share() -> None:
    inside = World(runtime_plan(page_size=4, window=8, full_pages=900, rows=8, chunk=8, overlap=False))
    shared = list(range(40))
    clients = inside.send_all([shared + [100 + number] * 30 for number in range(4)], 1)
    inside.run()
    assert [client.cached_tokens for client in clients] == [0, 40, 40, 40]
    assert inside.worker.computed_tokens == 70 + 3 * 30


def test_a_request_does_not_wait_for_a_sibling_that_computes_little_of_it() -> None:
    inside = World(runtime_plan(page_size=4, window=8, full_pages=900, rows=8, chunk=256, overlap=False))
    clients = inside.send_all([[1] * 4 + [number] * 30 for number in range(2, 6)], 1)
    assert len(inside.scheduler.state.running) == 4
    inside.run()
    assert [client.cached_tokens for client in clients] == [0] * 4


def test_siblings_of_a_request_that_is_cancelled_go_on_without_it() -> None:
    inside = World(runtime_plan(page_size=4, window=8, full_pages=900, rows=8, chunk=8))
    prompt = list(range(45))
    first, second, third = inside.send_all([prompt] * 3, 2)
    inside.deliver()
    inside.abort(first)
    inside.run()
    whole = answer(prompt, 2, 8)
    assert (second.output, third.output) == (whole, whole)
    assert third.cached_tokens == 44


class Oracle:
    """The longest prefix of anything computed before, floored to pages, with a token left to compute."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.prefixes: set[tuple[int, ...]] = set()

    def hit(self, prompt: list[int]) -> int:
        """What it would find."""
        most = (len(prompt) - 1) // self.page_size
        sizes = (pages * self.page_size for pages in range(most, 0, -1))
        return next((size for size in sizes if tuple(prompt[:size]) in self.prefixes), 0)

    def serve(self, client: Client) -> None:
        """Everything that was computed for a request: all but the last token of its answer."""
        computed = client.prompt + client.output[:-1]
        self.prefixes.update(
            tuple(computed[:size]) for size in range(self.page_size, len(computed) + 1, self.page_size)
        )


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(("overlap", "drafts"), [(True, 0), (False, 0), (True, 3), (False, 3)])
def test_25_cached_tokens_equal_an_oracle_on_a_trace_in_an_ample_pool(
    page_size: int, overlap: bool, drafts: int
) -> None:
    rng = random.Random(page_size)
    pages = 60_000 // page_size
    plan = runtime_plan(
        page_size=page_size, window=33, full_pages=pages, sliding_pages=pages, chunk=128, overlap=overlap,
        drafts=drafts, modules=drafts,
    )  # fmt: skip
    inside, oracle = World(plan), Oracle(page_size)
    systems = [[rng.randrange(48) for _ in range(length)] for length in (3, 100, 300)]
    chats = [list(rng.choice(systems)) for _ in range(12)]
    hits = 0
    for _ in range(120):
        at = rng.randrange(len(chats))
        prompt = chats[at] + [rng.randrange(48) for _ in range(rng.choice((1, 7, 40)))]
        stop_ids = rng.sample(range(48), 2)
        client = inside.send(prompt, rng.choice((0, 1, 30)), stop_ids)
        inside.run()
        assert client.cached_tokens == oracle.hit(prompt)
        hits += client.cached_tokens > 0
        oracle.serve(client)
        chats[at] = prompt + client.output
        if len(chats[at]) > 800:
            chats[at] = list(rng.choice(systems))
    assert hits > 60


@pytest.mark.parametrize("overlap", [True, False])
def test_round_robin_chats_that_fit_stay_above_nine_tenths_of_the_oracle(overlap: bool) -> None:
    rng = random.Random(9)
    plan = runtime_plan(page_size=16, window=64, full_pages=300, sliding_pages=150, chunk=128, overlap=overlap)
    inside, oracle = World(plan), Oracle(16)
    chats = [[rng.randrange(48) for _ in range(100)] for _ in range(12)]
    found = possible = 0
    for _ in range(6):
        for at, prompt in enumerate(chats):
            client = inside.send(prompt, 20)
            inside.run()
            found += client.cached_tokens
            possible += oracle.hit(prompt)
            oracle.serve(client)
            chats[at] = prompt + client.output + [rng.randrange(48) for _ in range(30)]
    assert sum(map(len, chats)) <= 300 * 16, "the chats were to fit"
    assert found > 0.9 * possible > 5_000


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_fifty_long_answers_in_a_tiny_pool_all_finish_with_the_answers_of_a_large_one(radix: bool, policy: str) -> None:
    plan = runtime_plan(page_size=4, window=12, full_pages=60, sliding_pages=60, rows=16, radix=radix, policy=policy)
    inside = World(plan)
    prompts = [[number % 7, *range(number, number + 11)] for number in range(50)]
    clients = []
    for prompt in prompts:
        inside.scheduler.state.share = 0.0  # expect no answers, so that pages run out
        clients.append(inside.send(prompt, 80))
    inside.run()
    assert [client.output for client in clients] == [answer(prompt, 80, 12) for prompt in prompts]
    assert sum(client.retractions for client in clients) == inside.scheduler.state.totals.retracted_requests > 0


def test_a_steady_load_is_hardly_ever_retracted_and_fills_the_pool() -> None:
    """Answers use a quarter of what they ask for: neither reserving all of it nor nothing would do."""
    rng = random.Random(3)
    plan = runtime_plan(page_size=4, window=12, full_pages=400, sliding_pages=400, rows=64, chunk=64, radix=False)
    inside = World(plan)
    used = []
    for _ in range(600):
        while len(inside.scheduler.state.queue) < 4:
            prompt = [rng.randrange(48) for _ in range(20)]
            whole = answer(prompt, 30 + rng.randrange(40), 12)
            late = [token for token in range(48) if token not in whole[:20]]
            inside.send(prompt, 200, stop_ids=late[:2])
        inside.deliver()
        used.append(inside.scheduler.state.cache.usage(0).requests)
    totals = inside.scheduler.state.totals
    assert totals.departures > 150
    assert totals.retracted_requests <= 0.01 * totals.departures
    assert sum(used[200:]) / len(used[200:]) > 0.7 * 400


def test_a_long_prompt_does_not_stop_the_answers_that_run() -> None:
    inside = World(runtime_plan(page_size=16, window=32, full_pages=900, rows=8, chunk=32, overlap=True))
    talking = inside.send([1, 2, 3], 60)
    long = inside.send([number % 40 for number in range(1500)], 1)
    heard = []
    while long.ending is None:
        before = len(talking.output)
        assert inside.deliver()
        heard.append(len(talking.output) - before)
    assert len(heard) >= 1500 // 32
    assert set(heard[2:45]) == {1}


@pytest.mark.parametrize("luck", [0.0, 1.0])
def test_18_no_guess_is_checked_behind_the_last_token_that_a_request_may_have(luck: float) -> None:
    """The worker refuses guesses behind the context; within it, answers end exactly at their limits."""
    inside = World(runtime_plan(context=64, rows=4, drafts=7, modules=7))
    inside.worker.luck = luck
    prompts = [[number] * length for number, length in enumerate((5, 40, 57, 63))]
    clients = [inside.send(prompt, most) for prompt, most in zip(prompts, (20, 64, 7, 64), strict=True)]
    inside.run()
    assert inside.worker.guesses
    for client, length in zip(clients, (25, 64, 64, 64), strict=True):
        assert client.output == answer(client.prompt, length - len(client.prompt), 8)
