"""Which images are made, who needs them, and which go when there are too many."""

from __future__ import annotations

from collections import OrderedDict

from srt.tiles import TileFiles
from srt.tokenizer.image_prompt import Picture


class _Entry:
    __slots__ = ("bytes", "picture", "sources", "users")

    def __init__(self, picture: Picture, size: int) -> None:
        self.picture = picture
        self.bytes = size
        self.users = 0
        self.sources: list[bytes] = []


class TileStore:
    """Tiles on disk, least recently used first out. Images that requests hold stay, whatever the budget.

    A source is the hash of an image as a client sends it: what was made of it once need not be made again.
    """

    def __init__(self, files: TileFiles, budget_bytes: int) -> None:
        self._files = files
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._by_source: dict[bytes, bytes] = {}
        self.total_bytes = 0
        self.held_bytes = 0

    @property
    def full(self) -> bool:
        """Whether the images that are held take all of the budget."""
        return self.held_bytes >= self._budget_bytes

    def find(self, source: bytes) -> Picture | None:
        """What was made of a source, if it is still there."""
        key = self._by_source.get(source)
        return None if key is None else self._entries[key].picture

    def add(self, picture: Picture, source: bytes | None) -> bool:
        """Book an image whose tiles have been written; False if they have been deleted meanwhile."""
        entry = self._entries.get(picture.key)
        if entry is None:
            if not self._files.there(picture.key):
                return False
            entry = _Entry(picture, self._files.bytes_of(picture.columns * picture.rows))
            self._entries[picture.key] = entry
            self.total_bytes += entry.bytes
        if source is not None and source not in self._by_source:
            self._by_source[source] = picture.key
            entry.sources.append(source)
        return True

    def hold(self, key: bytes) -> None:
        """A request needs an image until it releases it."""
        entry = self._entries[key]
        self._entries.move_to_end(key)
        if entry.users == 0:
            self.held_bytes += entry.bytes
        entry.users += 1

    def release(self, key: bytes) -> None:
        """A request does not need an image any more."""
        entry = self._entries[key]
        entry.users -= 1
        if entry.users == 0:
            self.held_bytes -= entry.bytes

    def trim(self) -> None:
        """Let go of images that nobody holds, until the rest fits."""
        if self.total_bytes <= self._budget_bytes:
            return
        for key, entry in list(self._entries.items()):
            if self.total_bytes <= self._budget_bytes:
                return
            if entry.users == 0:
                del self._entries[key]
                for source in entry.sources:
                    del self._by_source[source]
                self.total_bytes -= entry.bytes
                self._files.delete(key)
