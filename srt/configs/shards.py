"""What lies in a checkpoint's safetensors files, from their headers alone: no tensor is read.

Source: the safetensors format: 8 bytes little-endian header length, a JSON header, then the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from srt.errors import StartupError

HEADER_BYTES_MAX = 100_000_000
"""The format's own limit on the header."""


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a shard. `offsets` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.offsets[1] - self.offsets[0]


class _Header(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint in name order. Files count, not the index: an index may omit tensors.

    Raises: StartupError if there are none.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise StartupError(f"{directory} holds no *.safetensors file")
    return paths


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file in the order of their bytes.

    Raises: StartupError if the file is not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
            raise StartupError(f"{path} is not a safetensors file: header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        table = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        table.pop("__metadata__", None)
        heads = {name: msgspec.json.decode(entry, type=_Header) for name, entry in table.items()}
    except msgspec.DecodeError as error:
        raise StartupError(f"{path} has a damaged header: {error}") from error
    entries = [TensorEntry(name, head.dtype, head.shape, head.data_offsets) for name, head in heads.items()]
    entries.sort(key=lambda entry: entry.offsets)
    end = max((entry.offsets[1] for entry in entries), default=0)
    if 8 + length + end > size:
        raise StartupError(f"{path} is cut short: it has {size} bytes, its header speaks of {8 + length + end}")
    return entries


def all_entries(directory: Path) -> Iterator[tuple[Path, TensorEntry]]:
    """Every tensor of a checkpoint, shard by shard."""
    for path in shard_paths(directory):
        for entry in read_header(path):
            yield path, entry
