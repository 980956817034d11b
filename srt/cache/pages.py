"""The free list of one KV group's pool."""

from __future__ import annotations

from typing import Final

NULL_PAGE: Final = 0
"""Stands wherever a sequence has no page (any more). It is never given out and never read unmasked."""


class PagePool:
    """Pages 1 to `total` of one KV group; each is either free or out.

    Who has a page that is out is not this class's business: see `docs/kv_pages.md`.
    """

    __slots__ = ("_free", "_out", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total, 0, -1))
        self._out = bytearray(total + 1)

    @property
    def free(self) -> int:
        """Number of pages that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages, the ones given back last first.

        Raises: AssertionError if fewer are free; callers make room before they take.
        """
        if count <= 0:
            return []
        free, out = self._free, self._out
        assert count <= len(free), f"{count} pages wanted, {len(free)} free"
        taken = free[-count:]
        del free[-count:]
        for page in taken:
            out[page] = 1
        return taken

    def give(self, page: int) -> None:
        """Take a page back.

        Raises: AssertionError if the page is free already, which only a bug can bring about.
        """
        assert self._out[page], f"page {page} is given back but was not out"
        self._out[page] = 0
        self._free.append(page)

    def is_out(self, page: int) -> bool:
        """Whether the page has been taken and not given back."""
        return bool(self._out[page])

    def check(self) -> None:
        """Compare the list with the marks, page by page.

        Raises: AssertionError naming the pages on which the two disagree.
        """
        listed = set(self._free)
        assert len(listed) == len(self._free), "a page is on the free list twice"
        wrong = [page for page in range(1, self.total + 1) if (page in listed) == bool(self._out[page])]
        assert not wrong, f"pages {wrong} are both free and out, or neither"
        assert NULL_PAGE not in listed, "the null page is on the free list"
