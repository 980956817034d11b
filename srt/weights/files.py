"""Where tensors come from: the shards of a checkpoint, one tensor at a time, or a seeded generator."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from srt.configs.shards import all_entries, read_header, shard_paths
from srt.layers.parameter import Parameters
from srt.weights.rules import RuleBook


@dataclass(frozen=True)
class Item:
    """A tensor that can be had: its name, its bytes on disk and a way to read it, valid until the next item."""

    name: str
    bytes: int
    read: Callable[[], Tensor]


class Source(Protocol):
    """An ordered stream of tensors."""

    def names(self) -> list[tuple[str, int]]:
        """Name and bytes of every tensor, without reading one."""
        ...

    def items(self) -> Iterator[Item]:
        """The tensors, in the order in which they are cheapest to read."""
        ...


class Shards:
    """The safetensors files of a directory. What is in the files counts; an index is not looked at."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[tuple[str, int]]:
        return [(entry.name, entry.bytes) for _, entry in all_entries(self._directory)]

    def items(self) -> Iterator[Item]:
        """Shard by shard, in the order of bytes; one shard is open at a time."""
        for path in shard_paths(self._directory):
            entries = read_header(path)
            with safe_open(str(path), framework="pt") as file:
                for entry in entries:
                    yield Item(entry.name, entry.bytes, lambda name=entry.name: file.get_tensor(name))  # type: ignore[misc]


class Picked:
    """The tensors of a source whose names pass a test."""

    def __init__(self, source: Source, keep: Callable[[str], bool]) -> None:
        self._source, self._keep = source, keep

    def names(self) -> list[tuple[str, int]]:
        return [(name, size) for name, size in self._source.names() if self._keep(name)]

    def items(self) -> Iterator[Item]:
        return (item for item in self._source.items() if self._keep(item.name))


class Combined:
    """One source after the other."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources

    def names(self) -> list[tuple[str, int]]:
        return [entry for source in self._sources for entry in source.names()]

    def items(self) -> Iterator[Item]:
        for source in self._sources:
            yield from source.items()


class RandomWeights:
    """Every tensor that a model wants, drawn from a normal distribution of sane scale.

    A tensor depends on the seed and its name only: all ranks see the same one.
    """

    def __init__(self, parameters: Parameters, book: RuleBook, seed: int) -> None:
        self._seed = seed
        self._shapes = {
            source: parameters[target].pieces[piece].shape for source, target, piece in book.sources(parameters)
        }

    def names(self) -> list[tuple[str, int]]:
        return [(name, 4 * torch.Size(shape).numel()) for name, shape in self._shapes.items()]

    def items(self) -> Iterator[Item]:
        for name, size in self.names():
            yield Item(name, size, lambda name=name: self._draw(name))  # type: ignore[misc]

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        return torch.empty(shape).normal_(0.0, _spread(name, shape), generator=generator)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation that keeps activations near one through many layers."""
    if len(shape) == 1:
        return 0.05
    return 1.0 if "embed" in name else 0.6 / float(shape[-1]) ** 0.5
