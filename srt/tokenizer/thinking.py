"""Where a constraint begins when the model thinks first."""

from __future__ import annotations

from array import array
from typing import Final, NamedTuple

from srt.messages import Constraint
from srt.tokenizer.vocabulary import Vocabulary

THINK: Final = "<think>", "</think>"


class ThinkingIds(NamedTuple):
    """The tokens around what a model thinks."""

    begin: int
    end: int


def thinking_ids(vocabulary: Vocabulary) -> ThinkingIds | None:
    """Those of a checkpoint; None if it has none."""
    begin, end = (vocabulary.id_of(text) for text in THINK)
    return None if begin is None or end is None else ThinkingIds(begin, end)


def start_of(constraint: Constraint, packed: bytes, ids: ThinkingIds | None) -> int | None:
    """The token behind which a constraint begins after this prompt; None: it holds from the first one."""
    if not constraint.after_thinking or ids is None:
        return constraint.after_token
    backwards = array("i", packed)[::-1]
    begun, ended = (_first(backwards, token) for token in ids)
    return ids.end if begun is not None and (ended is None or begun < ended) else constraint.after_token


def _first(ids: array[int], token: int) -> int | None:
    try:
        return ids.index(token)
    except ValueError:
        return None
