"""Compiled grammars on their way from who compiles to who matches: files named by key, in the server's directory.

A key is a hash of all that the compiled form depends on. Who reads keeps what was used last.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from srt.grammar.contract import Compiled, GrammarBackend
from srt.grammar.errors import GrammarError
from srt.payloads import Constraint

KEY_BYTES: Final = 16
KEPT_BYTES: Final = 256 << 20
"""Memory that a worker's compiled grammars may take, beyond those in use."""


def key_of(constraint: Constraint) -> bytes:
    """The key of a constraint, wherever it begins."""
    form = constraint.kind, constraint.text, constraint.strict
    return hashlib.blake2b(msgspec.msgpack.encode(form), digest_size=KEY_BYTES).digest()


class GrammarFiles:
    """The directory of compiled grammars. A file is there whole or not at all."""

    def __init__(self, rundir: Path) -> None:
        self._directory = rundir / "grammars"

    def make(self) -> None:
        """Make the directory."""
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def write(self, key: bytes, data: bytes, writer: str) -> None:
        """Store a compiled grammar. Raises: OSError."""
        half = self._directory / f"{key.hex()}.{writer}"
        half.write_bytes(data)
        half.replace(self._path(key))

    def read(self, key: bytes) -> bytes:
        """Raises: GrammarError if there is no such file."""
        try:
            return self._path(key).read_bytes()
        except OSError as error:
            raise GrammarError(f"the compiled grammar is gone: {error.strerror}") from error

    def remove(self, key: bytes) -> None:
        """Forget a compiled grammar."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self._directory / key.hex()


class Shelf:
    """Compiled grammars that are loaded, those used last. May be asked by several threads."""

    def __init__(
        self, files: GrammarFiles, backend: Callable[[], GrammarBackend], kept_bytes: int = KEPT_BYTES
    ) -> None:
        """`backend` opens the library, once, when it is first needed or `open` is called."""
        self._files = files
        self._make_backend = backend
        self._backend: GrammarBackend | None = None
        self._kept_bytes = kept_bytes
        self._loaded: OrderedDict[bytes, Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()

    def open(self) -> GrammarBackend:
        """The library; this may take a second or two the first time."""
        with self._opening:
            if self._backend is None:
                self._backend = self._make_backend()
            return self._backend

    def get(self, key: bytes) -> Compiled:
        """A compiled grammar, loaded now if it is not. Raises: GrammarError."""
        with self._lock:
            found = self._loaded.get(key)
            if found is not None:
                self._loaded.move_to_end(key)
                return found
        compiled = self.open().load(self._files.read(key))
        with self._lock:
            self._loaded[key] = compiled
            total = sum(grammar.size for grammar in self._loaded.values())
            while total > self._kept_bytes and len(self._loaded) > 1:
                _, dropped = self._loaded.popitem(last=False)
                total -= dropped.size
        return compiled
