"""Leases, sharing and eviction, case by case; `test_radix_model.py` has the storm."""

from __future__ import annotations

import pytest

from srt.cache.lease import Lease
from srt.cache.pages import PagePool
from srt.cache.prefix import PrefixCache, common_bytes
from srt.configs.plan import GroupPlan
from tests.cache.support import Sequence, cache, group, packed, serve


def test_a_hit_is_floored_to_pages_and_leaves_a_token_to_compute() -> None:
    tokens = list(range(41))
    for page_size, hit in [(1, 40), (4, 40), (16, 32), (64, 0)]:
        pages = cache(page_size)
        serve(pages, tokens)
        assert serve(pages, tokens) == hit
        assert serve(pages, tokens[:33]) == min(hit, 32)


def test_generated_tokens_are_found_by_the_next_turn_except_the_last() -> None:
    pages = cache(page_size=1)
    serve(pages, [1, 2, 3], [4, 5, 6])
    assert serve(pages, [1, 2, 3, 4, 5, 6, 7]) == 5


def test_namespaces_never_share_a_prefix_and_vanish_with_their_last_page() -> None:
    pages = cache(page_size=1, full=20, sliding=20)
    assert [serve(pages, range(5), namespace=name) for name in ("", "a", "b", "a")] == [0, 0, 0, 4]
    assert set(pages.tree.roots) == {"", "a", "b"}
    serve(pages, range(100, 120), namespace="c")
    assert set(pages.tree.roots) == {"c"}


def test_pages_are_shared_while_the_row_that_computed_them_still_runs() -> None:
    pages = cache(page_size=4)
    first = Sequence(pages, range(40))
    first.compute(20)
    second = Sequence(pages, range(40))
    assert second.hit_tokens == 20
    assert second.lease.tables[0] == first.lease.tables[0]
    first.end()
    pages.check()
    second.compute(20)
    second.end()
    pages.check()
    assert pages.usage(0).tree == 10


def test_two_rows_that_computed_the_same_page_keep_their_own_and_the_tree_keeps_one() -> None:
    pages = cache(page_size=4)
    first, second = Sequence(pages, range(8)), Sequence(pages, range(8))
    first.compute(8)
    second.compute(8)
    pages.check()
    assert not set(first.lease.tables[0]) & set(second.lease.tables[0])
    assert (pages.usage(0).requests, pages.usage(0).tree) == (4, 2)
    second.end()
    pages.check()
    assert pages.usage(0).requests == 2
    first.end()
    assert (pages.usage(0).requests, pages.usage(0).free) == (0, 998)


def test_a_page_that_is_read_is_never_evicted() -> None:
    pages = cache(page_size=1, full=10, sliding=10)
    reader = Sequence(pages, range(6))
    reader.compute(6)
    table = list(reader.lease.tables[0])
    serve(pages, range(100, 104))
    serve(pages, range(200, 204))
    assert reader.lease.tables[0] == table
    assert [node.pages[0] for node in pages.tree.walk("", packed(range(6)), 6)] == table
    reader.end()


def test_the_least_recently_used_sequence_is_evicted_first_from_its_end() -> None:
    pages = cache(page_size=1, full=30, sliding=100)
    for start in (0, 100, 200):
        serve(pages, range(start, start + 10))
    serve(pages, range(10))  # the oldest is used again
    serve(pages, range(300, 305))
    found = [pages.match("", packed([*range(start, start + 10), 9])).tokens for start in (0, 100, 200)]
    assert found == [10, 5, 10]


def test_reserving_more_than_there_is_room_for_is_a_bug() -> None:
    pages = cache(page_size=1, full=5, sliding=100)
    row = Sequence(pages, range(6))
    assert pages.room() == 5
    with pytest.raises(AssertionError, match="6 pages wanted, 5 free"):
        row.compute(6)


def test_a_page_that_is_given_back_twice_is_a_bug() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.give(page)
    with pytest.raises(AssertionError, match=f"page {page} is given back but was not out"):
        pool.give(page)


def test_a_lost_page_is_counted_as_leaked_and_named_by_the_check() -> None:
    pages = cache(page_size=1, full=5, sliding=5)
    pages.pools[0].take(2)
    assert pages.leaked() == 2
    with pytest.raises(AssertionError, match="are out without an owner"):
        pages.check()


def test_flushing_forgets_every_prefix_and_frees_every_page() -> None:
    pages = cache(page_size=2)
    serve(pages, range(20))
    serve(pages, range(7), namespace="a")
    assert pages.flush() == 26
    assert [pool.free for pool in pages.pools] == [1000, 1000]
    assert pages.match("", packed(range(20))).tokens == 0


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("look_ahead", [1, 3])
def test_25_what_only_guesses_depend_on_changes_no_hit(page_size: int, look_ahead: int) -> None:
    """Cut after every token: the hits are those of a cache without a drafter, and no page is lost."""
    with_drafter, without = cache(page_size, look_ahead=look_ahead), cache(page_size)
    for end in range(1, 50):
        tokens = [*range(end), *range(90, 99)]
        assert serve(with_drafter, tokens, [1, 2]) == serve(without, tokens, [1, 2])
    assert with_drafter.tree.owned[2] == with_drafter.tree.owned[0] == without.tree.owned[0]


def test_15_pages_that_the_drafter_may_write_again_are_shared_when_it_is_done_with_them() -> None:
    pages = cache(page_size=4, look_ahead=3)
    row = Sequence(pages, range(22))
    row.compute(20)
    assert pages.tree.owned == [5, 5, 4], "its modules run on the last three again, one of them in the fifth page"
    row.compute(2)
    assert pages.tree.owned == [5, 5, 4]
    for token in (1, 2):
        row.say(token)
        row.compute(1)
        assert pages.tree.owned[2] == 5
    assert pages.tree.owned == [6, 6, 5]
    row.end()
    pages.check()
    assert pages.tree.owned == [6, 6, 6], "nobody writes any more"


def test_25_a_hit_takes_of_the_drafter_s_pages_what_is_there() -> None:
    pages = cache(page_size=4, window=8, look_ahead=3)
    row = Sequence(pages, range(20))
    row.compute(20)
    sibling = Sequence(pages, [*range(20), 7])
    assert sibling.hit_tokens == 20
    assert sibling.lease.tables[2] == [0, 0, *row.lease.tables[2][2:4], 0]
    pages.check()
    row.end()
    sibling.compute(1)
    pages.check()
    sibling.end()
    pages.check()
    assert pages.tree.owned == [5, 5, 5]


def test_25_a_hit_outlives_the_drafter_s_pages() -> None:
    pages = PrefixCache((group("full", None, 100), group("draft", 9, 12)), 2, guessing=1, look_ahead=1)
    serve(pages, range(21))
    serve(pages, range(30, 54))
    assert pages.tree.owned == [22, 12]
    assert all(node.pages[1] == 0 for node in pages.tree.walk("", packed(range(20)), 10))
    assert serve(pages, range(25)) == 20
    assert serve(pages, range(30, 54)) == 22


def test_a_drafter_that_sees_everything_has_tombstones_too() -> None:
    pages = PrefixCache((group("full", None, 100), group("draft", None, 100)), 2, guessing=1, look_ahead=1)
    serve(pages, range(21))
    path = pages.tree.walk("", packed(range(20)), 10)
    pages.tree._drop_page(path[3], 1)
    row = Sequence(pages, range(21))
    assert row.hit_tokens == 20
    assert row.lease.tables[1].count(0) == 1
    row.end()
    pages.check()


def test_a_third_group_with_its_own_window_shortens_hits_by_its_own_tombstones() -> None:
    groups = (group("full", None, 100), group("sliding", 8, 100), group("draft", 3, 100))
    pages = PrefixCache(groups, 2)
    serve(pages, range(21))
    path = pages.tree.walk("", packed(range(20)), 10)
    pages.tree._drop_page(path[8], 2)
    assert pages.match("", packed(range(21))).tokens == 20
    pages.tree._drop_page(path[9], 2)
    assert pages.match("", packed(range(21))).tokens == 16
    pages.check()


def test_a_tree_needs_a_group_that_keeps_everything() -> None:
    only: GroupPlan = group("sliding", 8, 10)
    with pytest.raises(AssertionError, match="a prefix tree needs a group with full attention"):
        PrefixCache((only,), 4)


def promised_pages(pages: PrefixCache, tokens: list[int]) -> int | None:
    """What a waiting request would hear of running rows."""
    promise = pages.promised(pages.match("", packed(tokens)), packed(tokens))
    return None if promise is None else promise[1]


def test_a_running_row_promises_the_prompt_pages_that_it_is_about_to_commit() -> None:
    pages = cache(page_size=4)
    assert promised_pages(pages, list(range(40))) is None
    row = Sequence(pages, range(42))
    assert promised_pages(pages, list(range(40))) == 9
    assert promised_pages(pages, [*range(18), 99, 98, 97]) == 4
    assert promised_pages(pages, list(range(4))) is None, "it could not use the page"
    assert promised_pages(pages, list(range(1, 40))) is None
    row.compute(20)
    assert promised_pages(pages, list(range(40))) == 9
    assert promised_pages(pages, [*range(18), 99, 98, 97]) is None, "all it shares is there"
    row.compute(22)
    assert promised_pages(pages, list(range(60))) is None, "what comes next is not known"
    row.end()
    assert not pages.promises


def test_a_row_that_ends_takes_its_promise_back() -> None:
    pages = cache(page_size=4)
    row: Lease = Sequence(pages, range(42)).lease
    pages.release(row)
    assert promised_pages(pages, list(range(40))) is None


def test_common_bytes_is_the_length_of_the_common_prefix() -> None:
    for a, b, expected in [(b"", b"x", 0), (b"abc", b"abd", 2), (b"abc", b"abcd", 3), (b"xbc", b"abc", 0)]:
        assert common_bytes(a, b) == common_bytes(b, a) == expected


def test_what_a_hit_lacks_is_told_by_why() -> None:
    pages = cache(page_size=4, window=8, full=40, sliding=6)
    serve(pages, range(40), chunk=4)
    whole = pages.match("", packed(range(40)))
    assert pages.missed(whole, 40) == {"absent": 0, "tombstone": 0, "page_rounding": 4}
    longer = pages.match("", packed([*range(40), *range(500, 511)]))
    assert pages.missed(longer, 51) == {"absent": 8, "tombstone": 0, "page_rounding": 3}
    # Ten pages went through a sliding pool of six: the windows of the first ones are gone, the way through them is not.
    shorter = pages.match("", packed(range(13)))
    assert pages.missed(shorter, 13) == {"absent": 0, "tombstone": 12, "page_rounding": 1}


def test_without_a_cache_everything_is_missed_for_that_reason() -> None:
    pages = cache(share=False)
    assert pages.missed(pages.match("", packed(range(9))), 9) == {"cache_off": 9}


def test_evictions_are_timed_by_the_clock_that_was_given() -> None:
    ticks = iter(range(0, 10**12, 2_000_000))
    pages = PrefixCache((group("full", None, 4), group("sliding", 8, 4)), page_size=4, clock_ns=lambda: next(ticks))
    for start in (0, 100, 200):
        serve(pages, range(start, start + 9))
    assert sum(pages.eviction_counts) > 0
    assert pages.eviction_ns == 2_000_000 * sum(pages.eviction_counts)
    assert pages.eviction_counts[5] == sum(pages.eviction_counts), "2 ms each: above 1 ms, at most 5"
