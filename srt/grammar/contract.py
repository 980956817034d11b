"""What a grammar backend offers: the seam between constraints and the libraries that know grammars.

A backend compiles in one process and matches in others, so what it compiles are bytes. Masks have one bit a token of
the vocabulary, little-endian in 32-bit words: [W] int32 with W = ceil(V / 32), as all such libraries use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec
from tokenizers import Tokenizer

from srt.bytelevel import token_bytes
from srt.payloads import Constraint

if TYPE_CHECKING:  # the tokenizer process knows this module and does without numpy
    import numpy as np
    from numpy.typing import NDArray

Mask: TypeAlias = "NDArray[np.int32]"


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens that a grammar is made of: bytes by id, nothing for special tokens and for ids without a token."""

    tokens: tuple[bytes, ...]
    eos_ids: tuple[int, ...]

    @classmethod
    def read(cls, directory: Path, size: int, eos_ids: tuple[int, ...]) -> Vocabulary:
        """Of a checkpoint whose logits have `size` entries."""
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        tokens = [b""] * size
        for text, index in tokenizer.get_vocab(with_added_tokens=True).items():
            if index < size and index not in special:
                tokens[index] = token_bytes(text)
        return cls(tuple(tokens), eos_ids)

    @property
    def words(self) -> int:
        """Words of a mask."""
        return -(-len(self.tokens) // 32)


class Matcher(Protocol):
    """Where one answer stands in its grammar."""

    def accept(self, token: int) -> bool:
        """Go on with a token, if it is allowed; else stay. Stop ids never come here: nothing follows them."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last accepted tokens back."""
        ...

    def fill(self, mask: Mask) -> None:
        """Write which tokens are allowed next, stop ids where the grammar can end."""
        ...

    def can_end(self) -> bool:
        """Whether what was accepted is complete; more may follow."""
        ...


class Compiled(Protocol):
    """A grammar over one vocabulary. `size` is about what it takes of memory, in bytes."""

    size: int

    def matcher(self, stop_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning."""
        ...


class GrammarBackend(Protocol):
    """A library that knows grammars. Made for one vocabulary."""

    def compile(self, constraint: Constraint) -> bytes:
        """The compiled form of a constraint. Raises: GrammarError."""
        ...

    def load(self, data: bytes) -> Compiled:
        """What `compile` gave, ready to be matched. Raises: GrammarError if it is something else."""
        ...
