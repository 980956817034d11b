"""Byte-level vocabularies: printable characters stand for bytes, one for each of the 256."""

from __future__ import annotations

from typing import Final


def _byte_alphabet() -> dict[str, int]:
    """Printable stand-ins of the 256 bytes in a byte-level vocabulary, as introduced by GPT-2's tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF: Final = _byte_alphabet()


def token_bytes(token: str) -> bytes:
    """What a token of a vocabulary stands for.

    Added tokens are stored as plain text: one character outside the alphabet makes the whole token literal.
    """
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()
