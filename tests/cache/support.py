"""Small pools and token helpers for the tests of the cache."""

from __future__ import annotations

from collections.abc import Iterable

from srt.cache.lease import Lease
from srt.cache.pages import NULL_PAGE
from srt.cache.prefix import PrefixCache
from srt.configs.plan import GroupPlan


def group(name: str, window: int | None, pages: int) -> GroupPlan:
    """A KV group of which only window and pool matter here."""
    return GroupPlan(name, layers=(0,), window=window, kv_heads=1, head_dim=1, pages=pages, page_bytes=1)


def packed(tokens: Iterable[int]) -> bytes:
    """Token ids as they travel: int32 little-endian."""
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def cache(
    page_size: int = 4, window: int = 8, full: int = 1000, sliding: int = 1000, share: bool = True, look_ahead: int = 0
) -> PrefixCache:
    """Two groups, full and sliding, with so many pages; with a look-ahead a third one that only guesses depend on."""
    groups = (group("full", None, full), group("sliding", window, sliding))
    if not look_ahead:
        return PrefixCache(groups, page_size, share=share)
    draft = group("draft", window + look_ahead - 1, sliding)
    return PrefixCache((*groups, draft), page_size, share=share, guessing=1, look_ahead=look_ahead)


class Sequence:
    """A row without a scheduler: computes tokens in steps that settle at once, and remembers what it wrote where."""

    def __init__(self, prefix_cache: PrefixCache, tokens: Iterable[int], namespace: str = "") -> None:
        self.cache = prefix_cache
        self.tokens = bytearray(packed(tokens))
        self.prompt_tokens = len(self)
        match = prefix_cache.match(namespace, bytes(self.tokens))
        self.hit_tokens = match.tokens
        self.computed = match.tokens
        self.lease: Lease = prefix_cache.open(match, bytes(self.tokens), self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.tokens) // 4

    def compute(self, tokens: int) -> None:
        """Compute the next `tokens` known tokens."""
        assert self.computed + tokens <= len(self)
        self.cache.reserve(self.lease, self.computed + tokens)
        self.computed += tokens
        self.cache.commit(self.lease, self.tokens, self.computed, self.computed)

    def say(self, token: int) -> None:
        """A token was sampled; its KV is not computed yet."""
        self.tokens += token.to_bytes(4, "little")

    def live_pages(self, group_index: int) -> list[int]:
        """The row's pages of a group, without those it has left behind."""
        return [page for page in self.lease.tables[group_index] if page != NULL_PAGE]

    def end(self) -> None:
        """Release everything."""
        self.cache.release(self.lease)


def serve(
    prefix_cache: PrefixCache, prompt: Iterable[int], answer: Iterable[int] = (), chunk: int = 64, namespace: str = ""
) -> int:
    """Run one request alone, from match to release; returns the tokens it found cached. Its last token has no KV."""
    sequence = Sequence(prefix_cache, prompt, namespace)
    while sequence.computed < len(sequence):
        sequence.compute(min(chunk, len(sequence) - sequence.computed))
    for index, token in enumerate(answer):
        if index:
            sequence.compute(1)
        sequence.say(token)
    sequence.end()
    prefix_cache.check()
    return sequence.hit_tokens
