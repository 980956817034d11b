"""The scheduler's only door to KV memory: match · open · reserve · commit · release · check.

A row holds its pages through a `Lease`. Pages are committed when the step that filled them has settled, so that
siblings share them while their row still runs. `docs/kv_pages.md` has the rules in prose.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from srt.cache import audit
from srt.cache.lease import Lease, Match, Usage
from srt.cache.pages import NULL_PAGE, PagePool
from srt.cache.radix import Node, RadixTree
from srt.configs.plan import GroupPlan
from srt.messages import EVICTION_BOUNDS_S


def _no_clock() -> int:
    return 0


class PrefixCache:
    """Pools, tree and leases of all KV groups.

    `share` False: nothing enters the tree, so nothing is ever found there. The last `guessing` groups hold KV that only
    guesses depend on: it changes no hit, and a hit takes of it what is there. At a position it has seen up to
    `look_ahead` tokens beyond, so while a row runs its pages there are shared so many tokens later than the others.
    `clock_ns` times evictions, one count for each of `EVICTION_BOUNDS_S` and one beyond; nothing else depends on it.
    """

    def __init__(
        self,
        groups: Sequence[GroupPlan],
        page_size: int,
        *,
        share: bool = True,
        guessing: int = 0,
        look_ahead: int = 0,
        clock_ns: Callable[[], int] = _no_clock,
    ) -> None:
        self.groups = tuple(groups)
        self.page_size = page_size
        self.look_ahead = look_ahead
        self.pools = [PagePool(group.pages) for group in groups]
        self.tree = RadixTree([group.window for group in groups], page_size, self.pools, guessing)
        self.leases: set[Lease] = set()
        self.promises: dict[tuple[Node, bytes], Lease] = {}
        self._share, self._clock_ns = share, clock_ns
        self.eviction_counts = [0] * (len(EVICTION_BOUNDS_S) + 1)
        self.eviction_ns = 0
        # Evicting a leaf of a full group frees its sliding pages too, so full groups make room first.
        self._room_order = [*self.tree.full, *(group for group, _ in self.tree.reaches)]

    # --- looking ---------------------------------------------------------------------------------------

    def match(self, namespace: str, token_ids: bytes) -> Match:
        """The longest usable prefix of a sequence, leaving at least one token to compute. Touches nothing.

        `token_ids`: int32 little-endian.
        """
        if not self._share:
            return Match(namespace, [], 0)
        possible = self._pages_to_hit(token_ids)
        path = self.tree.walk(namespace, token_ids, possible)
        walked = len(path)
        del path[self.tree.usable(path, walked) :]
        return Match(namespace, path, len(path) * self.page_size, walked, possible)

    def missed(self, match: Match, prompt_tokens: int) -> dict[str, int]:
        """Tokens of a prompt that must be computed, by why they were not found.

        `absent`: the tree does not have them, or no longer. `tombstone`: it has them without a window that a row would
        read. `page_rounding`: they do not fill a page, or are the last token, which is always computed.
        """
        if not self._share:
            return {"cache_off": prompt_tokens}
        size = self.page_size
        found = {
            "absent": (match.possible - match.walked) * size,
            "tombstone": (match.walked - len(match.path)) * size,
        }
        return found | {"page_rounding": prompt_tokens - match.tokens - sum(found.values())}

    def _pages_to_hit(self, token_ids: bytes) -> int:
        return (len(token_ids) // 4 - 1) // self.page_size

    def hit_pages(self, match: Match, group: int) -> int:
        """How many pages of a group a row that begins with the hit will read."""
        return len(match.path) - self._first_hit_page(match, group)

    def idle_pages(self, match: Match, group: int) -> int:
        """How many of them are evictable now, and will not be any more once the hit is used."""
        hit = match.path[self._first_hit_page(match, group) :]
        return sum(node.pages[group] != NULL_PAGE and node.pins[group] == 0 for node in hit)

    def _first_hit_page(self, match: Match, group: int) -> int:
        return 0 if self.tree.windows[group] is None else self._first_page(match.tokens, group)

    def available(self, group: int) -> int:
        """Pages of a group that could be reserved now: free or evictable."""
        return self.pools[group].free + len(self.tree.shelves[group])

    def room(self) -> int:
        """Logical pages that could be reserved now, in every group at once."""
        return min(self.available(group) for group in range(len(self.groups)))

    def promised(self, match: Match, token_ids: bytes) -> tuple[Lease, int] | None:
        """Whether a live row is about to commit the page that comes next after a match.

        Returns that row's lease and the number of pages it will have in common with `token_ids`, or None.
        """
        root = self.tree.roots.get(match.namespace)
        if root is None or len(match.path) >= self._pages_to_hit(token_ids):
            return None
        width = self.tree.key_bytes
        start = len(match.path) * width
        tip = match.path[-1] if match.path else root
        lease = self.promises.get((tip, token_ids[start : start + width]))
        if lease is None:
            return None
        return lease, min(common_bytes(lease.source, token_ids) // width, self._pages_to_hit(token_ids))

    # --- holding ---------------------------------------------------------------------------------------

    def open(self, match: Match, token_ids: bytes, prompt_tokens: int) -> Lease:
        """Begin a row with what was matched. `token_ids` are all tokens known, `prompt_tokens` of them the prompt."""
        tree, depth = self.tree, len(match.path)
        lease = Lease(tree.enter(match.namespace), token_ids, prompt_tokens // self.page_size, len(self.groups))
        tree.warm_up(match.path, depth)
        for group in range(len(self.groups)):
            start = lease.starts[group] = self._first_hit_page(match, group)
            lease.tables[group] = [NULL_PAGE] * start
            for node in match.path[start:]:
                if node.pages[group] != NULL_PAGE:  # in groups that only guesses depend on there may be tombstones
                    tree.pin(node, group)
                lease.tables[group].append(node.pages[group])
        lease.path.extend(match.path)
        lease.shown = depth
        self.leases.add(lease)
        self._promise_next(lease)
        return lease

    def reserve(self, lease: Lease, tokens: int) -> None:
        """Give the row pages for its first `tokens` positions in every group, evicting where needed.

        Raises: AssertionError if `room` does not suffice; callers look first.
        """
        count = -(-tokens // self.page_size) - lease.pages
        if count <= 0:
            return
        for group in self._room_order:
            pool = self.pools[group]
            if pool.free < count:
                self._evict(group, count - pool.free)
            lease.tables[group].extend(pool.take(count))
            lease.own[group] += count

    def _evict(self, group: int, count: int) -> None:
        began_ns = self._clock_ns()
        self.tree.evict(group, count)
        took_ns = self._clock_ns() - began_ns
        self.eviction_counts[bisect_left(EVICTION_BOUNDS_S, took_ns / 1e9)] += 1
        self.eviction_ns += took_ns

    def commit(self, lease: Lease, token_ids: bytearray, known: int, settled: int) -> None:
        """Steps have settled: offer full pages to the tree and let go of what no later step can see.

        `known`: leading tokens of `token_ids` whose KV is computed and final. `settled`: positions that settled
        steps have computed, so that steps in flight begin at `settled` or later.
        """
        if self._share:
            self._grow(lease, token_ids, known // self.page_size)
            if self.tree.needed < len(self.groups):
                self._show(lease, min(known, len(token_ids) // 4 - self.look_ahead) // self.page_size)
        for group, _ in self.tree.reaches:
            self._slide(lease, group, min(self._first_page(settled, group), lease.pages))

    def _grow(self, lease: Lease, token_ids: bytearray, depth: int) -> None:
        tree, width = self.tree, self.tree.key_bytes
        if len(lease.path) >= depth:
            return
        for index in range(len(lease.path), depth):
            parent = lease.path[-1] if lease.path else lease.root
            offered = [table[index] for table in lease.tables[: self.tree.needed]]
            node = tree.insert(parent, bytes(token_ids[index * width : (index + 1) * width]), offered)
            for group, page in enumerate(offered):
                if page != NULL_PAGE and node.pages[group] == page:
                    lease.own[group] -= 1
            if len(parent.children) > 1:
                tree.warm_up(lease.path, index)
            lease.path.append(node)
            if index + 1 == lease.prompt_pages:
                tree.warm_up(lease.path, index + 1)
        self._promise_next(lease)

    def _show(self, lease: Lease, depth: int) -> None:
        """Offer pages that only guesses depend on to the nodes of the row's path that are there without them."""
        for index in range(lease.shown, min(depth, len(lease.path))):
            for group in range(self.tree.needed, len(self.groups)):
                if self.tree.offer(lease.path[index], group, lease.tables[group][index]):
                    lease.own[group] -= 1
            lease.shown = index + 1

    def _slide(self, lease: Lease, group: int, first: int) -> None:
        table = lease.tables[group]
        for index in range(lease.starts[group], first):
            self._let_go(lease, group, index)
            table[index] = NULL_PAGE
        lease.starts[group] = max(first, lease.starts[group])

    def _let_go(self, lease: Lease, group: int, index: int) -> None:
        """The row reads a page of a sliding group no more: unpin it in the tree, or free the row's own."""
        page = lease.tables[group][index]
        if page == NULL_PAGE:
            return
        node = lease.path[index] if index < len(lease.path) else None
        if node is not None and node.pages[group] == page:
            self.tree.unpin(node, group)
        else:
            self.pools[group].give(page)
            lease.own[group] -= 1

    def release(self, lease: Lease) -> None:
        """End a row: its own pages are free, the committed ones stay in the tree until they are evicted."""
        self.leases.remove(lease)
        self._forget_promise(lease)
        tree, path = self.tree, lease.path
        # Nobody writes them any more: what is not final in them has seen guesses, which is better than nothing.
        self._show(lease, len(path))
        tree.warm_up(path, len(path))
        for group, window in enumerate(tree.windows):
            shelf = tree.shelves[group]
            # Deepest first, so that on the shelf a child lies before its parent.
            for index in range(lease.pages - 1, lease.starts[group] - 1, -1):
                if window is None and index < len(path) and path[index].pages[group] != lease.tables[group][index]:
                    tree.unpin(path[index], group)
                    self.pools[group].give(lease.tables[group][index])
                    lease.own[group] -= 1
                else:
                    self._let_go(lease, group, index)
            for index in range(min(lease.starts[group], len(path)) - 1, -1, -1):
                shelf.refresh(path[index])
        tree.leave(lease.root)

    def flush(self) -> int:
        """Drop every cached prefix, and say how many tokens that were.

        Raises: AssertionError while there are leases.
        """
        assert not self.leases, f"{len(self.leases)} rows hold pages"
        full = self.tree.full[0]
        pages = self.tree.owned[full]
        self.tree.evict(full, pages)
        return pages * self.page_size

    def _first_page(self, position: int, group: int) -> int:
        """The first logical page that a query at `position` or later reads in a sliding group."""
        window = self.tree.windows[group]
        assert window is not None, "only a sliding group leaves pages behind"
        return max(0, position - window + 1) // self.page_size

    # --- promises: pages that a row is about to commit ---------------------------------------------------

    def _promise_next(self, lease: Lease) -> None:
        self._forget_promise(lease)
        width = self.tree.key_bytes
        start = len(lease.path) * width
        if not self._share or start + width > len(lease.source):
            return
        promise = (lease.path[-1] if lease.path else lease.root, lease.source[start : start + width])
        if promise not in self.promises:
            self.promises[promise] = lease
            lease.promise = promise

    def _forget_promise(self, lease: Lease) -> None:
        if lease.promise is not None:
            del self.promises[lease.promise]
            lease.promise = None

    # --- counting --------------------------------------------------------------------------------------

    def usage(self, group: int) -> Usage:
        """Pages of one group by owner."""
        tree, evictable = self.tree.owned[group], len(self.tree.shelves[group])
        own = sum(lease.own[group] for lease in self.leases)
        return Usage(self.pools[group].total, self.pools[group].free, own + tree - evictable, tree, evictable)

    def leaked(self) -> int:
        """Pages, over all groups, that are neither free nor a row's nor the tree's; 0 unless there is a bug."""
        return sum(
            use.total - use.free - use.requests - use.evictable for use in map(self.usage, range(len(self.groups)))
        )

    def check(self) -> None:
        """Account for every single page, pin and shelf place. Costs time in proportion to the pools.

        Raises: AssertionError with the first law that does not hold.
        """
        audit.check_pages(self.pools, self.tree, self.leases)
        audit.check_pins(self.tree, self.leases)
        audit.check_shelves(self.tree)


def common_bytes(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two byte strings."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size  # a[:low] == b[:low], and a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
