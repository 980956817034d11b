"""The prefix tree: token ids to pages, per KV group.

A node stands for one page of tokens below its parent; a path from a namespace's root spells a prefix. `pages[g]` is
the page that holds the node's tokens in group g. Full groups always have one. A sliding group may have lost it: the
node is then a *tombstone* in that group, which shortens hits whose window would read it and harms nobody else.

    root ─▶ [t0 … t15] ─▶ [t16 … t31] ─▶ [t32 … t47]     full      7 · 3 · 9
                                     └─▶ [t32'… t47']    sliding   0 · 4 · 8     (0: tombstone)

Pins count rows. In a full group a row pins every node of its path, so that a pinned node's ancestors are pinned too.
In a sliding group it pins the nodes whose page it reads. A page without pins lies on its group's shelf and is
evicted from there. See `docs/kv_pages.md` for the rules in prose.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from srt.cache.pages import NULL_PAGE, PagePool

EVERYTHING: Final = 1 << 40
"""A window that no sequence leaves, in tokens."""


class Node:
    """One page of tokens. A root has no parent, an empty key, and counts in `pins[0]` the rows of its namespace."""

    __slots__ = ("children", "key", "pages", "parent", "pins", "warm")

    def __init__(self, parent: Node | None, key: bytes, groups: int) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[bytes, Node] = {}
        self.pages = [NULL_PAGE] * groups
        self.pins = [0] * groups
        self.warm = [False] * groups


class Shelf:
    """Nodes whose page of one group nobody reads, in the order of eviction: cold before warm, then least recent first.

    Full groups have no warm pages. There a child always lies before its parent, because both are put back deepest
    first: so the first node of a full shelf is a leaf.
    """

    __slots__ = ("_cold", "_warm")

    def __init__(self) -> None:
        self._cold: OrderedDict[Node, None] = OrderedDict()
        self._warm: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cold) + len(self._warm)

    def __iter__(self) -> Iterator[Node]:
        yield from self._cold
        yield from self._warm

    def put(self, node: Node, warm: bool) -> None:
        """Put a node where it is evicted last among its kind."""
        (self._warm if warm else self._cold)[node] = None

    def remove(self, node: Node, warm: bool) -> None:
        """Take a node off; `warm` is what it was put with."""
        del (self._warm if warm else self._cold)[node]

    def refresh(self, node: Node) -> None:
        """Make a cold node the most recent one of the cold; a warm one keeps its place."""
        if node in self._cold:
            self._cold.move_to_end(node)

    def first(self) -> Node | None:
        """The node to evict next."""
        return next(iter(self._cold or self._warm), None)


class RadixTree:
    """All namespaces, over the pools of all groups.

    `windows[g]` counts the keys a query sees in group g, None if all. At least one group must be full, because its
    pages are what keeps a path together. The first `needed` groups make hits; the last `guessing` ones hold what may be
    missing, so they are treated as sliding whatever they see.
    """

    def __init__(
        self, windows: Sequence[int | None], page_size: int, pools: Sequence[PagePool], guessing: int = 0
    ) -> None:
        self.needed = len(windows) - guessing
        unbounded = [EVERYTHING if window is None else window for window in windows[self.needed :]]
        self.windows = (*windows[: self.needed], *unbounded)
        self.full = [g for g, window in enumerate(self.windows) if window is None]
        self.reaches = [
            (g, window_pages(window, page_size)) for g, window in enumerate(self.windows) if window is not None
        ]
        assert self.full, "a prefix tree needs a group with full attention"
        self.key_bytes = 4 * page_size
        self.pools = tuple(pools)
        self.shelves = [Shelf() for _ in windows]
        self.owned = [0] * len(self.windows)
        self.evicted = [0] * len(self.windows)
        self.roots: dict[str, Node] = {}

    def walk(self, namespace: str, token_ids: bytes, pages: int) -> list[Node]:
        """The nodes that spell the first pages of `token_ids`, as far as there are any, at most `pages`."""
        path: list[Node] = []
        node = self.roots.get(namespace)
        if node is None:
            return path
        width = self.key_bytes
        for start in range(0, pages * width, width):
            child = node.children.get(token_ids[start : start + width])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def usable(self, path: Sequence[Node], depth: int) -> int:
        """The greatest hit of at most `depth` pages whose windows are whole in every sliding group that hits need.

        A hit of d pages reads, in a group that reaches r pages back, the pages [max(0, d - r), d). If one of them is
        a tombstone at i, no hit between i + 1 and d is whole either, so the search goes on from i.
        """
        while depth > 0:
            hole = max((self._hole(path, depth, g, r) for g, r in self.reaches if g < self.needed), default=-1)
            if hole < 0:
                return depth
            depth = hole
        return 0

    def _hole(self, path: Sequence[Node], depth: int, group: int, reach: int) -> int:
        """Index of the deepest tombstone that a hit of `depth` pages would read in a group; -1 if there is none."""
        for index in range(depth - 1, max(0, depth - reach) - 1, -1):
            if path[index].pages[group] == NULL_PAGE:
                return index
        return -1

    def enter(self, namespace: str) -> Node:
        """The root of a namespace, kept until as many rows `leave` it."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Node(None, namespace.encode(), len(self.windows))
        root.pins[0] += 1
        return root

    def leave(self, root: Node) -> None:
        """Undo one `enter`; an empty namespace is forgotten with its last row."""
        root.pins[0] -= 1
        self._forget_if_empty(root)

    def pin(self, node: Node, group: int) -> None:
        """A row begins to read the node's page of a group."""
        if node.pins[group] == 0:
            self.shelves[group].remove(node, node.warm[group])
        node.pins[group] += 1

    def unpin(self, node: Node, group: int) -> None:
        """A row reads the node's page of a group no longer."""
        node.pins[group] -= 1
        if node.pins[group] == 0:
            self.shelves[group].put(node, node.warm[group])

    def insert(self, parent: Node, key: bytes, offered: Sequence[int]) -> Node:
        """The child of `parent` for `key`, pinned for the row that offers its own pages for it.

        `offered` are those of the first groups. Each becomes the tree's as `offer` says; in a full group the row pins
        the node either way. The caller sees what was taken by comparing `pages`.
        """
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, len(self.windows))
        for group, page in enumerate(offered):
            if not self.offer(node, group, page) and self.windows[group] is None:
                node.pins[group] += 1
        return node

    def offer(self, node: Node, group: int, page: int) -> bool:
        """Whether a row's own page becomes the node's, pinned for that row.

        It does where nobody reads the node's page of that group, or there is none: the old one is free again, and that
        is how a tombstone heals. Where somebody does, the tree keeps the old page and the row keeps its own.
        """
        if page == NULL_PAGE or node.pins[group]:
            return False
        old = node.pages[group]
        if old == NULL_PAGE:
            self.owned[group] += 1
        else:
            self.shelves[group].remove(node, node.warm[group])
            self.pools[group].give(old)
        node.pages[group] = page
        node.pins[group] = 1
        return True

    def warm_up(self, path: Sequence[Node], depth: int) -> None:
        """Keep the windows before `depth` longest: here a request ended, branched off or hit, so another one may.

        One page more than the window is kept, because a prompt that ends exactly at a page's end hits a page less.
        """
        for group, reach in self.reaches:
            shelf = self.shelves[group]
            for node in path[max(0, depth - reach - 1) : depth]:
                if node.pages[group] == NULL_PAGE:
                    continue
                if node.pins[group] == 0:
                    shelf.remove(node, node.warm[group])
                    shelf.put(node, warm=True)
                node.warm[group] = True

    def evict(self, group: int, count: int) -> None:
        """Free up to `count` pages of a group, first those that are least likely to be asked for.

        A full group loses leaves, with what they hold in other groups. A sliding group gets tombstones.
        """
        shelf = self.shelves[group]
        for _ in range(count):
            node = shelf.first()
            if node is None:
                return
            if self.windows[group] is None:
                self._remove(node)
            else:
                self._drop_page(node, group)

    def _remove(self, node: Node) -> None:
        assert not node.children, "a node with children was first on the shelf"
        for group, page in enumerate(node.pages):
            if page != NULL_PAGE:
                self._drop_page(node, group)
        parent = node.parent
        assert parent is not None, "a root has no page to evict"
        del parent.children[node.key]
        if parent.parent is None:
            self._forget_if_empty(parent)

    def _drop_page(self, node: Node, group: int) -> None:
        self.shelves[group].remove(node, node.warm[group])
        self.pools[group].give(node.pages[group])
        node.pages[group] = NULL_PAGE
        node.warm[group] = False
        self.owned[group] -= 1
        self.evicted[group] += 1

    def _forget_if_empty(self, root: Node) -> None:
        if not root.children and root.pins[0] == 0:
            del self.roots[root.key.decode()]


def window_pages(window: int, page_size: int) -> int:
    """Pages before a page border that a query right after it reads: those of the `window - 1` tokens before it."""
    return -(-(window - 1) // page_size)
