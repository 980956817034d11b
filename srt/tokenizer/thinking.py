"""Where a constraint begins when the model thinks first."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

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
    prompt = np.frombuffer(packed, "<i4")
    begun, ended = (np.flatnonzero(prompt == token) for token in ids)
    thinks = len(begun) > 0 and (not len(ended) or ended[-1] < begun[-1])
    return ids.end if thinks else constraint.after_token
