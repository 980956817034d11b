"""The laws of `docs/kv_pages.md`, checked page by page. For tests and for whoever suspects a leak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from srt.cache.lease import Lease
from srt.cache.pages import NULL_PAGE, PagePool
from srt.cache.radix import Node, RadixTree


def nodes(tree: RadixTree) -> Iterator[Node]:
    """Every node that stands for tokens, parents first."""
    waiting = [child for root in tree.roots.values() for child in root.children.values()]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children.values())


def check_pages(pools: Sequence[PagePool], tree: RadixTree, leases: Collection[Lease]) -> None:
    """Every page is free, or the tree's, or one row's; and the counters agree."""
    for group, pool in enumerate(pools):
        pool.check()
        trees = [node.pages[group] for node in nodes(tree) if node.pages[group] != NULL_PAGE]
        assert len(trees) == tree.owned[group], f"group {group}: the tree counts {tree.owned[group]}, has {len(trees)}"
        rows: list[int] = []
        for lease in leases:
            own = own_pages(lease, group, group >= tree.needed)
            assert len(own) == lease.own[group], f"group {group}: a row counts {lease.own[group]}, owns {len(own)}"
            rows.extend(own)
        owners = Counter(trees + rows)
        assert all(count == 1 for count in owners.values()), f"group {group}: pages with two owners: {owners}"
        lost = [page for page in range(1, pool.total + 1) if pool.is_out(page) != (page in owners)]
        assert not lost, f"group {group}: pages {lost} are out without an owner, or free with one"
        if tree.windows[group] is None:
            assert all(node.pages[group] != NULL_PAGE for node in nodes(tree)), "a tombstone in a full group"


def own_pages(lease: Lease, group: int, guessing: bool) -> list[int]:
    """Pages of a row's table that are not the tree's. In a group that only guesses depend on, some may be missing."""
    table, path, start = lease.tables[group], lease.path, lease.starts[group]
    assert all(page == NULL_PAGE for page in table[:start]), "a page behind the window is still in the table"
    assert guessing or all(page != NULL_PAGE for page in table[start:]), "a page that the row reads is missing"
    return [
        page
        for index, page in enumerate(table)
        if page != NULL_PAGE and not (index < len(path) and path[index].pages[group] == page)
    ]


def check_pins(tree: RadixTree, leases: Collection[Lease]) -> None:
    """Full groups: one pin a row for each node of its path. Sliding groups: one for each page of the tree it reads."""
    full = set(tree.full)
    pins: Counter[tuple[Node, int]] = Counter()
    roots: Counter[Node] = Counter()
    for lease in leases:
        roots[lease.root] += 1
        parent = lease.root
        for index, node in enumerate(lease.path):
            assert node.parent is parent, "a path is broken"
            assert parent.children.get(node.key) is node, "a path has left the tree"
            parent = node
            for group, table in enumerate(lease.tables):
                reads = table[index] != NULL_PAGE and table[index] == node.pages[group]
                pins[node, group] += group in full or reads
    for node in nodes(tree):
        for group, count in enumerate(node.pins):
            assert count == pins[node, group], f"group {group}: {count} pins, {pins[node, group]} readers"
    for name, root in tree.roots.items():
        assert root.pins[0] == roots[root], f"namespace {name!r}: {root.pins[0]} pins, {roots[root]} rows"
        assert root.children or roots[root], f"namespace {name!r} is empty and still there"


def check_shelves(tree: RadixTree) -> None:
    """What nobody reads lies on its shelf, nothing else does, and on a full shelf children lie before parents."""
    for group, shelf in enumerate(tree.shelves):
        idle = {node for node in nodes(tree) if node.pages[group] != NULL_PAGE and node.pins[group] == 0}
        order = list(shelf)
        assert len(order) == len(shelf) == len(idle), f"group {group}: {len(shelf)} on the shelf, {len(idle)} idle"
        assert set(order) == idle, f"group {group}: the shelf holds other nodes than the idle ones"
        if tree.windows[group] is None:
            place = {node: index for index, node in enumerate(order)}
            for node in order:
                for child in node.children.values():
                    assert place[child] < place[node], f"group {group}: a parent would be evicted before its child"
        else:
            warm = [node.warm[group] for node in order]
            assert warm == sorted(warm), f"group {group}: a warm page lies among the cold"
