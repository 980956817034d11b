"""What the cache hands to a row: the match it begins with, the lease it holds, and how pages are counted."""

from __future__ import annotations

from typing import NamedTuple

from srt.cache.radix import Node


class Match(NamedTuple):
    """What the tree has of a sequence. Valid until the cache next changes.

    `path` are the nodes that a row can use, `tokens` how many they hold. The tree has `walked` pages of the sequence,
    usable or not, of `possible` ones that could have been a hit.
    """

    namespace: str
    path: list[Node]
    tokens: int
    walked: int = 0
    possible: int = 0


class Usage(NamedTuple):
    """Pages of one group by owner: free + requests + evictable = total, unless pages leaked.

    `requests` are read by rows: their own and those of the tree that they pin. `tree` counts all of the tree's.
    """

    total: int
    free: int
    requests: int
    tree: int
    evictable: int


class Lease:
    """The pages of one row. Per KV group, the table names the page of each logical page:

        [0, starts[g])       NULL_PAGE: fell out of a sliding window, or was never needed after a hit
        [starts[g], depth)   committed: the tree's page, pinned, or the row's own where the tree kept another one
        [depth, pages)       the row's own: reserved, and computed as far as the steps have come

    `depth` is the length of `path`, the row's way through the tree. `own[g]` counts the pages of the table that are
    not the tree's. `source` are the tokens known at the start; `promise` names the page of them that the row will
    commit next. `told` is how far the worker knows the tables.

    In groups that only guesses depend on, pages before `shown` are committed, and those of a hit may be missing.
    """

    __slots__ = ("own", "path", "promise", "prompt_pages", "root", "shown", "source", "starts", "tables", "told")

    def __init__(self, root: Node, source: bytes, prompt_pages: int, groups: int) -> None:
        self.root = root
        self.source = source
        self.prompt_pages = prompt_pages
        self.path: list[Node] = []
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        self.starts = [0] * groups
        self.own = [0] * groups
        self.told = 0
        self.shown = 0
        self.promise: tuple[Node, bytes] | None = None

    @property
    def pages(self) -> int:
        """Logical pages reserved so far."""
        return len(self.tables[0])

    def held(self, group: int) -> int:
        """Pages of a group that the row reads or will write."""
        return len(self.tables[group]) - self.starts[group]

    def tell(self) -> list[tuple[int, list[int]]]:
        """Per group the first logical page that the worker has not been told of, and the pages from there on."""
        told, self.told = self.told, self.pages
        news = []
        for table, start in zip(self.tables, self.starts, strict=True):
            first = max(told, start)
            news.append((first, table[first:]))
        return news
