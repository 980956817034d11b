"""Shards of the new checkpoint, written one after the other: at most one is in memory."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 << 30


class ShardWriter:
    """Collects tensors into shards of about `shard_bytes`; `finish` names them and writes the index."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory, self._limit = directory, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor for the current shard; a full shard goes to disk first."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.cpu().contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write what is left, give the shards their names, list every tensor in the index."""
        self._flush()
        count, places = len(self._shards), dict[str, str]()
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self._directory / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(list(self._pending))
            save_file(self._pending, str(self._path(len(self._shards))), metadata={"format": "pt"})
            self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self._directory / f"model-{number:05d}.part"
