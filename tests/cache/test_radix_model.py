"""The tree, its pools and its leases against a naive model, with a vocabulary of two so that prefixes collide."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from srt.cache.audit import nodes
from srt.cache.lease import Match
from srt.cache.pages import NULL_PAGE
from srt.cache.prefix import PrefixCache
from srt.cache.radix import Node
from tests.cache.support import Sequence, cache, packed

SPACES = ("", "", "", "salt")
PROMPTS = st.builds(
    lambda base, shared, tail: base[:shared] + tail,
    st.sampled_from([[0] * 16, [0] * 6 + [1] * 10]),
    st.integers(0, 16),
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
)
"""Two sequences that part after six tokens, cut anywhere, with a short tail: most prompts meet another one."""


def spelled(node: Node) -> bytes:
    """All tokens from the root to the end of a node."""
    above = spelled(node.parent) if node.parent is not None and node.parent.parent is not None else b""
    return above + node.key


class CacheMachine(RuleBasedStateMachine):
    """Rows come, compute, speak and go, in pools that are ample (`tight` False) or force eviction."""

    tight = True
    look_ahead = 0

    @initialize(page_size=st.sampled_from([1, 2, 3]), window=st.sampled_from([1, 2, 4, 7]))
    def build(self, page_size: int, window: int) -> None:
        """Pools of 12 and 9 pages, or more than all sequences together can need."""
        full, sliding = (12, 9) if self.tight else (2000, 2000)
        self.page_size, self.window = page_size, window
        self.cache: PrefixCache = cache(page_size, window, full, sliding, look_ahead=self.look_ahead)
        self.groups = len(self.cache.groups)
        self.rows: list[tuple[str, Sequence]] = []
        self.written: list[dict[int, tuple[str, bytes]]] = [{} for _ in range(self.groups)]
        self.computed: list[tuple[str, bytes]] = []

    @rule(tokens=PROMPTS, space=st.sampled_from(SPACES))
    def arrive(self, tokens: list[int], space: str) -> None:
        """A row begins with what the tree has of its prompt."""
        if len(self.rows) >= 4:
            return
        packed_tokens = packed(tokens)
        match = self.cache.match(space, packed_tokens)
        assert match.tokens == self.expected_hit(space, packed_tokens, match)
        self.rows.append((space, Sequence(self.cache, tokens, space)))

    @rule(tokens=PROMPTS, space=st.sampled_from(SPACES), count=st.integers(1, 19))
    def serve(self, tokens: list[int], space: str, count: int) -> None:
        """A row comes, computes all at once or a part of it, and goes."""
        if len(self.rows) < 4:
            self.arrive(tokens, space)
            self.compute_tokens(*self.rows[-1], count)
            self.rows.pop()[1].end()

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, 19))
    def compute(self, data: st.DataObject, count: int) -> None:
        """A row computes some of its tokens, as far as there are pages."""
        self.compute_tokens(*self.pick(data), count)

    def compute_tokens(self, space: str, row: Sequence, count: int) -> None:
        """Reserve, write and commit."""
        room = (row.lease.pages + self.cache.room()) * self.page_size - row.computed
        count = min(count, len(row) - row.computed, room)
        if count <= 0:
            return
        before = row.computed
        self.cache.reserve(row.lease, before + count)
        for index in range(before // self.page_size, (before + count - 1) // self.page_size + 1):
            for group in range(self.groups):
                spelling = bytes(row.tokens[: 4 * (index + 1) * self.page_size])
                self.written[group][row.lease.tables[group][index]] = (space, spelling)
        row.compute(count)
        self.computed.append((space, bytes(row.tokens[: 4 * row.computed])))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1))
    def speak(self, data: st.DataObject, token: int) -> None:
        """A row that has computed all it knows samples a token."""
        _, row = self.pick(data)
        if row.computed == len(row) < 20:
            row.say(token)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A row ends, finished or not."""
        space, row = self.pick(data)
        row.end()
        self.rows.remove((space, row))

    @precondition(lambda self: not self.rows)
    @rule()
    def flush(self) -> None:
        """Nothing is left of the tree, and every page is free."""
        self.cache.flush()
        self.computed.clear()
        assert not self.cache.tree.roots
        assert all(pool.free == pool.total for pool in self.cache.pools)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        """The exhaustive check, and the cheap one."""
        self.cache.check()
        assert self.cache.leaked() == 0

    @invariant()
    def every_page_of_the_tree_holds_what_its_path_spells(self) -> None:
        """A hit can never read another sequence's KV."""
        for node in nodes(self.cache.tree):
            content = (top(node).key.decode(), spelled(node))
            for group, page in enumerate(node.pages):
                assert page == NULL_PAGE or self.written[group][page] == content

    @invariant()
    def every_row_reads_its_own_past(self) -> None:
        """Each page that a row's next token can see holds that row's tokens; of a drafter's some may be missing."""
        for space, row in self.rows:
            for group, window in enumerate(self.cache.tree.windows):
                first = 0 if window is None else max(0, row.computed - window + 1)
                for index in range(first // self.page_size, row.computed // self.page_size):
                    page = row.lease.tables[group][index]
                    if group == 2 and page == NULL_PAGE:
                        assert index * self.page_size < row.hit_tokens
                        continue
                    spelling = bytes(row.tokens[: 4 * (index + 1) * self.page_size])
                    assert self.written[group][page] == (space, spelling)

    @invariant()
    def no_page_that_a_drafter_may_write_again_is_shared(self) -> None:
        """Its modules run again on the last tokens that a row knows."""
        for _, row in self.rows if self.look_ahead else ():
            first = max(row.hit_tokens, len(row) - self.look_ahead) // self.page_size
            mine = set(row.lease.tables[2][first:]) - {NULL_PAGE}
            assert mine.isdisjoint(node.pages[2] for node in nodes(self.cache.tree))

    def pick(self, data: st.DataObject) -> tuple[str, Sequence]:
        """One of the rows."""
        return data.draw(st.sampled_from(self.rows))

    def expected_hit(self, space: str, tokens: bytes, match: Match) -> int:
        """The hit by the definition, from the nodes (tight) or from all that was ever computed (ample)."""
        most = min(len(tokens) // 4 - 1, self.longest(space, tokens)) // self.page_size
        if not self.tight:
            return max(0, most) * self.page_size
        path = self.cache.tree.walk(space, tokens, len(tokens) // 4 // self.page_size)
        return next(depth for depth in range(most, -1, -1) if self.whole(path, depth)) * self.page_size

    def whole(self, path: list[Node], depth: int) -> bool:
        """Whether every sliding page that the token after `depth` pages sees is there."""
        hit = depth * self.page_size
        seen = range(max(0, hit - self.window + 1), hit)
        return depth <= len(path) and all(path[p // self.page_size].pages[1] != NULL_PAGE for p in seen)

    def longest(self, space: str, tokens: bytes) -> int:
        """Tokens in common with anything computed in the namespace, in whole pages."""
        best = 0
        for name, known in self.computed:
            pages = len(known) // 4 // self.page_size
            for depth in range(pages + 1):
                size = depth * self.page_size
                if name == space and known[: 4 * size] == tokens[: 4 * size] and size <= len(tokens) // 4:
                    best = max(best, size)
        return best

    def teardown(self) -> None:
        """When all rows have gone, nothing is held by requests."""
        if not hasattr(self, "cache"):
            return
        for _, row in self.rows:
            row.end()
        self.cache.check()
        for group in range(self.groups):
            assert self.cache.usage(group).requests == 0


def top(node: Node) -> Node:
    """The root above a node."""
    return node if node.parent is None else top(node.parent)


class AmpleMachine(CacheMachine):
    """Nothing is ever evicted: hits equal the oracle."""

    tight = False


class DraftMachine(CacheMachine):
    """A drafter's KV saw two tokens more than its position, and there may be none."""

    look_ahead = 2


class AmpleDraftMachine(DraftMachine):
    """Hits equal the oracle with a drafter too."""

    tight = False


@pytest.mark.parametrize(
    "machine",
    [CacheMachine, AmpleMachine, DraftMachine, AmpleDraftMachine],
    ids=lambda machine: machine.__name__,
)
def test_the_tree_agrees_with_a_naive_model(machine: type[CacheMachine]) -> None:
    case: Any = machine.TestCase
    case.settings = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case("runTest").debug()
