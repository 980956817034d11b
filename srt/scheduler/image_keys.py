"""What an image's positions look like to the prefix cache: its content, not its placeholder tokens.

All images of one layout have the same token ids. The cache sees the ids of a prompt with each image's positions,
marks included, replaced by values drawn from the image's key, which hashes pixels and layout. Another image, or
another layout of the same one, differs at every position; the values are negative, so no token equals them. Two
images agree on their first k positions with a probability of 2^(-31 k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from srt.messages import ImageSpan

ID_BYTES: Final = 4
_NEGATIVE: Final = bytes(byte | 0x80 for byte in range(256))


def keyed_ids(token_ids: bytes, images: Sequence[ImageSpan]) -> bytearray:
    """The ids that the cache knows a prompt by. Both are int32 little-endian."""
    keyed = bytearray(token_ids)
    for span in images:
        drawn = bytearray(hashlib.shake_128(span.key).digest(ID_BYTES * span.tokens))
        drawn[ID_BYTES - 1 :: ID_BYTES] = drawn[ID_BYTES - 1 :: ID_BYTES].translate(_NEGATIVE)
        keyed[ID_BYTES * span.start : ID_BYTES * (span.start + span.tokens)] = drawn
    return keyed


def plain_ids(keyed: bytes, prompt: bytes) -> bytes:
    """The token ids of a sequence that begins with a prompt: the prompt's own, then those that are no image's."""
    return prompt + keyed[len(prompt) :]
