"""The four tests that a cache over sliding windows has to pass, and what tombstones do and do not."""

from __future__ import annotations

import random

import pytest

from srt.cache.pages import NULL_PAGE
from srt.cache.prefix import PrefixCache
from tests.cache.support import Sequence, cache, packed, serve

PAGE, WINDOW = 4, 32
"""A window is the 31 tokens before a query and the query itself: 8 pages before a page border."""


def ids(rng: random.Random, count: int) -> list[int]:
    """Tokens that nobody else will ever have."""
    return [rng.randrange(1 << 30) for _ in range(count)]


class Oracle:
    """A cache of endless memory: the longest prefix of anything computed, floored to pages, one token left."""

    def __init__(self) -> None:
        self.computed: list[list[int]] = []

    def hit(self, prompt: list[int]) -> int:
        """What it would find."""
        return max((self.shared(prompt, known) for known in self.computed), default=0) // PAGE * PAGE

    def serve(self, prompt: list[int], answer: list[int]) -> None:
        """An answer's last token has no KV."""
        self.computed.append(prompt + answer[:-1])

    @staticmethod
    def shared(prompt: list[int], known: list[int]) -> int:
        """Common prefix, leaving a token of the prompt to compute."""
        pairs = zip(prompt[:-1], known, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt) - 1, len(known)))


def test_an_append_only_chat_hits_everything_that_was_said_before() -> None:
    rng, oracle = random.Random(1), Oracle()
    chats = cache(PAGE, WINDOW, full=500, sliding=40)
    prompt = ids(rng, 100)
    for turn in range(12):
        answer = ids(rng, rng.randrange(1, 60))
        hit = serve(chats, prompt, answer)
        assert hit == oracle.hit(prompt), f"turn {turn}"
        oracle.serve(prompt, answer)
        prompt = prompt + answer + ids(rng, rng.randrange(1, 40))


def test_a_repeated_prompt_hits_all_but_its_last_page() -> None:
    rng = random.Random(2)
    for length in (4, 5, 40, 41, 43, 44):
        prompt = ids(rng, length)
        repeats = cache(PAGE, WINDOW, full=500, sliding=20)
        serve(repeats, prompt, ids(rng, 60))
        assert serve(repeats, prompt) == (length - 1) // PAGE * PAGE


def test_chats_that_share_a_long_system_prompt_hit_it_however_old_its_sliding_pages_are() -> None:
    rng = random.Random(3)
    system = ids(rng, 203)
    chats = cache(PAGE, WINDOW, full=2000, sliding=400)
    first = system + ids(rng, 50)
    for _ in range(10):  # the first chat goes on far past the window
        answer = ids(rng, 30)
        serve(chats, first, answer)
        first = first + answer + ids(rng, 20)
    assert serve(chats, system + ids(rng, 50)) == 200


def test_a_system_prompt_that_was_shared_once_stays_when_sliding_pages_run_short() -> None:
    """Its window is warm from the first branch on; the pages inside the chats go first."""
    rng = random.Random(4)
    system = ids(rng, 203)
    chats = cache(PAGE, WINDOW, full=4000, sliding=120)
    for _ in range(2):
        serve(chats, system + ids(rng, 150), ids(rng, 20))
    for turn in range(30):
        assert serve(chats, system + ids(rng, 150), ids(rng, 20)) == 200, f"chat {turn}"


@pytest.mark.parametrize("sliding", [260, 1100], ids=["a quarter of the full pool", "as large as the full pool"])
def test_round_robin_chats_that_fit_together_stay_above_nine_tenths_of_the_oracle(sliding: int) -> None:
    rng, oracle = random.Random(5), Oracle()
    chats = cache(PAGE, WINDOW, full=1100, sliding=sliding)
    prompts = [ids(rng, 60) for _ in range(10)]
    found = possible = 0
    for _ in range(8):
        for index, prompt in enumerate(prompts):
            answer = ids(rng, 20)
            found += serve(chats, prompt, answer)
            possible += oracle.hit(prompt)
            oracle.serve(prompt, answer)
            prompts[index] = prompt + answer + ids(rng, 20)
    assert sum(map(len, prompts)) <= 1100 * PAGE, "the chats were to fit"
    assert possible > 10_000
    assert found > 0.9 * possible


@pytest.mark.parametrize("drops_reasoning", [False, True])
def test_a_very_long_agent_session_is_not_vetoed_by_tombstones(drops_reasoning: bool) -> None:
    """The session is many times as long as the sliding pool; its template may cut the reasoning out of old turns."""
    rng, oracle = random.Random(6), Oracle()
    session = cache(PAGE, WINDOW, full=2000, sliding=50)
    prompt = ids(rng, 300)
    for turn in range(40):
        reasoning, words = ids(rng, 60), ids(rng, 20)
        hit = serve(session, prompt, reasoning + words)
        assert hit == oracle.hit(prompt), f"turn {turn}"
        oracle.serve(prompt, reasoning + words)
        prompt = prompt + (words if drops_reasoning else reasoning + words) + ids(rng, 70)
    assert len(prompt) > 15 * 50 * PAGE


def punch(prefix_cache: PrefixCache, prompt: list[int], index: int) -> None:
    """Evict one sliding page of a prompt that nobody reads."""
    node = prefix_cache.tree.walk("", packed(prompt), index + 1)[index]
    prefix_cache.tree._drop_page(node, 1)


def test_a_tombstone_shortens_only_the_hits_whose_window_would_read_it() -> None:
    prompt = list(range(200))
    for index, expected in [(49, 196), (48, 192), (41, 164), (40, 196), (0, 196)]:
        holed = cache(PAGE, WINDOW)
        serve(holed, [*prompt, 1])  # 50 pages
        punch(holed, prompt, index)
        assert holed.match("", packed(prompt)).tokens == expected, f"page {index} of 50"


def test_a_request_that_computes_a_tombstone_again_heals_it() -> None:
    prompt = list(range(200))
    holed = cache(PAGE, WINDOW)
    serve(holed, [*prompt, 1])
    punch(holed, prompt, 44)
    assert serve(holed, [*prompt, 2]) == 176
    assert serve(holed, [*prompt, 3]) == 200
    usage = holed.usage(0)
    assert usage.tree * PAGE == 200, "the tree keeps one page for each, not the copy"


def test_pages_behind_a_running_row_s_window_can_be_evicted_and_those_within_cannot() -> None:
    row_cache = cache(PAGE, WINDOW, full=100, sliding=30)
    row = Sequence(row_cache, range(100))
    row.compute(100)
    assert row_cache.usage(1).requests == 25 - (100 - WINDOW + 1) // PAGE
    held = row.live_pages(1)
    assert row_cache.available(1) == 30 - len(held)
    row_cache.tree.evict(1, 30)
    row_cache.check()
    path = row_cache.tree.walk("", packed(range(100)), 25)
    assert [node.pages[1] for node in path[-len(held) :]] == held
    assert all(node.pages[1] == NULL_PAGE for node in path[: -len(held)])
    row.end()
    row_cache.check()


def test_without_a_tree_a_row_frees_what_its_window_has_left() -> None:
    plain = cache(PAGE, WINDOW, full=100, sliding=12, share=False)
    row = Sequence(plain, range(200))
    for _ in range(50):
        row.compute(PAGE)
        assert len(row.live_pages(1)) <= 9
    assert (plain.usage(0).requests, plain.usage(0).tree) == (50, 0)
    row.end()
    plain.check()
    assert [plain.pools[group].free for group in range(2)] == [100, 12]
    assert serve(plain, range(200), chunk=8) == 0
