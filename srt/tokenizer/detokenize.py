"""Token ids to text, one at a time: characters only when whole, stop strings only when they did not happen."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from srt.tokenizer.vocabulary import Vocabulary

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental text of one answer.

    The texts of all `feed` calls and of `finish`, joined, equal `Vocabulary.decode` of all ids fed. Bytes that may
    still become a character wait; U+FFFD appears only where the whole text has it.
    """

    __slots__ = ("_decode", "_skipped", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decode = _Utf8Decoder("replace").decode

    def feed(self, token_ids: Iterable[int]) -> str:
        """Text that these ids complete."""
        bytes_of, skipped = self._vocabulary.bytes_of, self._skipped
        return self._decode(b"".join([bytes_of(index) for index in token_ids if index not in skipped]))

    def finish(self) -> str:
        """What an incomplete character at the end decodes to."""
        return self._decode(b"", True)


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may become one.

    The match that is complete first wins; of two that end at the same character the longer one. So the result does
    not depend on how the text was cut.
    """

    __slots__ = ("_held", "_keep", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        assert stops
        assert all(stops)
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._keep = keep
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing may be fed after it."""

    def feed(self, text: str) -> str:
        """Text that may be shown now; after a match it ends before the stop string (behind it with `keep`)."""
        assert self.matched is None
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            return text[: end if self._keep else start]
        held = self._start_of_possible_stop(text)
        self._held = text[held:]
        return text[:held]

    def _start_of_possible_stop(self, text: str) -> int:
        """First position from which the rest of the text is the beginning of a stop string."""
        floor = max(0, len(text) - self._longest + 1)
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], floor)
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1)
        return first

    def flush(self) -> str:
        """What was held back, once nothing more can come."""
        held, self._held = self._held, ""
        return held
