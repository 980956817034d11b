"""Where tensors come from: the shards of a checkpoint, one tensor at a time, or a seeded generator."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from srt.configs.shards import all_entries, read_header, shard_paths
from srt.errors import StartupError
from srt.layers.parameter import Parameters
from srt.weights.rules import RuleBook

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Dtypes of the safetensors format that a checkpoint may hold."""


@dataclass(frozen=True)
class Listed:
    """What is known of a tensor before it is read; `file` is empty where tensors come from elsewhere."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    file: str = ""

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.file else self.name


@dataclass(frozen=True)
class Item:
    """A tensor that can be had: its name, its bytes on disk and a way to read it, valid until the next item."""

    name: str
    bytes: int
    read: Callable[[], Tensor]


class Source(Protocol):
    """An ordered stream of tensors."""

    def names(self) -> list[Listed]:
        """Every tensor, without reading one."""
        ...

    def items(self) -> Iterator[Item]:
        """The tensors, in the order in which they are cheapest to read."""
        ...


class Shards:
    """The safetensors files of a directory. What is in the files counts; an index is not looked at."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[Listed]:
        """Raises: StartupError if a shard is damaged or a tensor has a dtype that no checkpoint may have."""
        listed = []
        for path, entry in all_entries(self._directory):
            dtype = DTYPES.get(entry.dtype)
            if dtype is None:
                raise StartupError(
                    f"tensor {entry.name} in {path.name} has dtype {entry.dtype}, known are {', '.join(DTYPES)}"
                )
            listed.append(Listed(entry.name, entry.shape, dtype, entry.bytes, path.name))
        return listed

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

    def names(self) -> list[Listed]:
        return [entry for entry in self._source.names() if self._keep(entry.name)]

    def items(self) -> Iterator[Item]:
        return (item for item in self._source.items() if self._keep(item.name))


class Combined:
    """One source after the other."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources

    def names(self) -> list[Listed]:
        return [entry for source in self._sources for entry in source.names()]

    def items(self) -> Iterator[Item]:
        for source in self._sources:
            yield from source.items()


class RandomWeights:
    """Every tensor that a model wants, drawn from a normal distribution of sane scale.

    A tensor depends on the seed, its name and the kind of device only: all ranks see the same one.
    """

    def __init__(self, parameters: Parameters, book: RuleBook, seed: int) -> None:
        self._seed = seed
        self._listed = {}
        for wanted in book.wanted(parameters):
            parameter = parameters[wanted.target]
            shape, dtype = parameter.pieces[wanted.piece].shape, parameter.dtype
            size = torch.Size(shape).numel() * dtype.itemsize
            self._listed[wanted.name] = Listed(wanted.name, shape, dtype, size)

    def names(self) -> list[Listed]:
        return list(self._listed.values())

    def items(self) -> Iterator[Item]:
        for listed in self._listed.values():
            yield Item(listed.name, listed.bytes, lambda listed=listed: self._draw(listed))  # type: ignore[misc]

    def _draw(self, listed: Listed) -> Tensor:
        device = torch.get_default_device()
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self._seed} {listed.name}".encode()))
        if listed.dtype == torch.uint8:
            return torch.randint(0, 256, listed.shape, dtype=torch.uint8, generator=generator)
        if "scale" in listed.name:
            return _scales(listed)
        spread = _spread(listed.name, listed.shape)
        if listed.dtype == torch.float8_e4m3fn:
            spread = CODE_SPREAD
        if device.type == "cpu":
            return torch.empty(listed.shape).normal_(0.0, spread, generator=generator).to(listed.dtype)
        drawn = torch.empty(listed.shape, dtype=_drawn_in(listed.dtype))
        drawn.normal_(0.0, spread, generator=generator)
        if listed.dtype == torch.float8_e4m3fn:
            drawn.clamp_(-448.0, 448.0)  # beyond, there is no code
        return drawn.to(listed.dtype)


def _drawn_in(dtype: torch.dtype) -> torch.dtype:
    """What a GPU draws numbers in: as narrow as may be, for gigabytes of them are drawn."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


CODE_SPREAD = 100.0
"""Standard deviation of random e4m3 codes: in the upper part of their range, where real ones lie."""


def _scales(listed: Listed) -> Tensor:
    """Scales under which random codes become weights of sane size; those of groups are 1."""
    if listed.dtype == torch.float8_e4m3fn:
        return torch.ones(listed.shape).to(listed.dtype)
    return torch.full(listed.shape, 0.01 / CODE_SPREAD if len(listed.shape) > 2 else 0.003)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation that keeps activations near one through many layers."""
    if len(shape) == 1:
        return 0.05
    fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
    return 1.0 if "embed" in name else 0.6 / float(fan_in) ** 0.5
