"""Where the pixels of images wait for the worker: one file an image in the server's private directory.

An image's file is named after a hash of its pixels and layout, so equal images of many requests are there once, each
rank reads the same bytes, and no process in between carries them. The tokenizer has them written and deletes them,
workers read.

    crops, row by row [n, crop_size, crop_size, 3] uint8 · global view [view_size, view_size, 3] uint8
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srt.configs.plan import ImageConfig

DIRECTORY = "tiles"


class TileFiles:
    """The files of one server."""

    def __init__(self, rundir: Path, config: ImageConfig) -> None:
        self._directory = rundir / DIRECTORY
        self._config = config

    def make(self) -> None:
        """Create the directory."""
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def bytes_of(self, crops: int) -> int:
        """Size of the file of an image with so many crops."""
        return 3 * (crops * self._config.crop_size**2 + self._config.view_size**2)

    def write(self, key: bytes, parts: Sequence[memoryview], writer: str) -> None:
        """Put an image there, all of it or nothing. `writer` tells apart who may write the same image at once.

        Raises: OSError if the disk is full.
        """
        path = self._path(key)
        draft = path.with_suffix(f".{writer}")
        try:
            with draft.open("wb") as file:
                file.writelines(parts)
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)

    def read(self, key: bytes, crops: int) -> tuple[memoryview, memoryview]:
        """Crops and global view of an image with so many crops.

        Raises: FileNotFoundError if it is not there, ValueError if it has another size.
        """
        path, expected = self._path(key), self.bytes_of(crops)
        size = path.stat().st_size
        if size != expected:
            raise ValueError(f"tiles {key.hex()} have {size} bytes, expected {expected}")
        pixels = bytearray(size)
        with path.open("rb", buffering=0) as file:
            file.readinto(pixels)
        split = self.bytes_of(crops) - self.bytes_of(0)
        return memoryview(pixels)[:split], memoryview(pixels)[split:]

    def there(self, key: bytes) -> bool:
        """Whether an image has a file."""
        return self._path(key).exists()

    def delete(self, key: bytes) -> None:
        """Forget an image."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self._directory / key.hex()
