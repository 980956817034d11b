"""The marks of reasoning as tokens of one checkpoint: whether a prompt leaves the model thinking, and for how long it
thinks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from srt.formats.description import TextFormat
from srt.messages import Constraint, SamplingSpec, ThinkingBudget
from srt.tokenizer.vocabulary import Vocabulary

BYTES_PER_ID: Final = 4


def _last(packed: bytes, token_id: int | None) -> int:
    """Where a token last stands in packed ids, in bytes; -1 if it does not."""
    if token_id is None:
        return -1
    wanted = token_id.to_bytes(BYTES_PER_ID, "little")
    at = packed.rfind(wanted)
    while at >= 0 and at % BYTES_PER_ID:
        at = packed.rfind(wanted, 0, at + BYTES_PER_ID - 1)
    return at


class ReasoningCount:
    """Tokens of one answer's reasoning, the one that ends it included."""

    __slots__ = ("_ends", "is_open", "tokens")

    def __init__(self, ends: Iterable[int], *, is_open: bool) -> None:
        self._ends = frozenset(ends)
        self.is_open = is_open
        """Whether the reasoning goes on."""
        self.tokens = 0

    def add(self, token_ids: Iterable[int]) -> None:
        """More tokens of the answer."""
        if self.is_open:
            for token_id in token_ids:
                self.tokens += 1
                if token_id in self._ends:
                    self.is_open = False
                    return


class Thinking:
    """Knows where reasoning begins and ends, if the checkpoint writes it in a format that is known and each mark of it
    is one token; else nothing is reasoning."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        reasoning: TextFormat | None,
        calls: TextFormat | None,
        turn_ends: Iterable[int],
    ) -> None:
        self._open_id = None if reasoning is None else vocabulary.id_of(reasoning.think_open)
        self.close_id = None if reasoning is None else vocabulary.id_of(reasoning.think_close)
        """The token that ends reasoning."""
        self._call_id = None if calls is None else vocabulary.id_of(calls.call_open)
        self._turn_ends = tuple(turn_ends)
        self._forced_end = "" if reasoning is None else reasoning.padding + reasoning.think_close + reasoning.padding
        self._opening = None if reasoning is None else reasoning.think_open

    def is_open(self, packed: bytes) -> bool:
        """Whether the model goes on thinking behind this prompt, which is int32 ids.

        The last mark counts, and only behind the last end of a turn: users may write of marks too.
        """
        opened = _last(packed, self._open_id)
        if self.close_id is None or opened < 0:
            return False
        return opened > max(_last(packed, token_id) for token_id in (self.close_id, *self._turn_ends))

    def start_of(self, constraint: Constraint, packed: bytes) -> int | None:
        """The token behind which a constraint begins after this prompt; None: it holds from the first one."""
        return self.close_id if constraint.after_thinking and self.is_open(packed) else constraint.after_token

    def limited(self, sampling: SamplingSpec, tokens: int | None, *, is_open: bool, with_tools: bool) -> SamplingSpec:
        """Sampling of a request whose reasoning, if its prompt opens one, has at most so many tokens."""
        if tokens is None or self.close_id is None or not is_open:
            return sampling
        budget = ThinkingBudget(tokens, self.close_id, self._ends(with_tools=with_tools))
        return msgspec.structs.replace(sampling, thinking=budget)

    def _ends(self, *, with_tools: bool) -> tuple[int, ...]:
        ends = (self.close_id, self._call_id) if with_tools else (self.close_id,)
        return tuple(end for end in ends if end is not None)

    def count(self, *, is_open: bool, with_tools: bool) -> ReasoningCount | None:
        """A count for an answer; a call ends the reasoning where there are tools to be called."""
        if self.close_id is None:
            return None
        return ReasoningCount(self._ends(with_tools=with_tools), is_open=is_open)

    def ended(self, text: str) -> str:
        """A rendered prompt with its reasoning ended before it has begun."""
        if self._opening is None or not text.rstrip().endswith(self._opening):
            return text
        return text + self._forced_end
