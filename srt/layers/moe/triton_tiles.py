"""How large a tile of the Triton experts is: a small table, by weight format and by how many pairs an expert gets.

Measured on an H200 with 288 experts of width 1280 and a hidden size of 4096 (docs/benchmarks.md, "Experts on a GPU").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class Tile:
    """One product's tile: `columns` outputs (of gate and of up each) over steps of `step` along K."""

    columns: int
    step: int
    warps: int
    stages: int
    tma: bool = False
    """Weights come through the tensor memory accelerator."""
    joined: bool = False
    """NVFP4: one long product a step in place of four, which pays where the matrix units are the limit."""
    shares: int = 1
    """Programs that share K out among them, where there would be too few to keep the GPU busy."""


@dataclass(frozen=True)
class Tiles:
    """Both products of a layer, and the pairs that a program computes at once."""

    rows: int
    gate_up: Tile
    down: Tile


_PLAIN: Final = (
    (0, Tiles(8, Tile(64, 64, 4, 5), Tile(64, 128, 4, 4))),
    (0.12, Tiles(16, Tile(64, 128, 4, 3), Tile(128, 64, 8, 5))),
    (9, Tiles(32, Tile(64, 64, 4, 4), Tile(128, 64, 8, 5))),
    (18, Tiles(64, Tile(64, 64, 4, 4), Tile(128, 64, 8, 4))),
    (40, Tiles(64, Tile(128, 64, 8, 4, tma=True), Tile(128, 64, 8, 4))),
    (80, Tiles(128, Tile(128, 64, 8, 4, tma=True), Tile(256, 64, 8, 3))),
)
_FP8: Final = (
    (0, Tiles(8, Tile(64, 128, 4, 5), Tile(64, 128, 4, 4))),
    (0.12, Tiles(16, Tile(64, 128, 4, 5), Tile(128, 128, 4, 4))),
    (9, Tiles(32, Tile(64, 128, 4, 5), Tile(128, 128, 4, 4, tma=True))),
    (18, Tiles(32, Tile(128, 128, 8, 3, tma=True), Tile(128, 128, 4, 4, tma=True))),
    (40, Tiles(64, Tile(64, 128, 4, 4), Tile(128, 128, 4, 3, tma=True))),
    (96, Tiles(128, Tile(64, 128, 4, 3), Tile(128, 128, 8, 3, tma=True))),
)
_NVFP4: Final = (
    (0, Tiles(8, Tile(64, 256, 4, 3, shares=2), Tile(64, 256, 4, 3))),
    (0.05, Tiles(8, Tile(64, 256, 4, 3, shares=2), Tile(128, 256, 4, 3))),
    (0.12, Tiles(8, Tile(64, 256, 4, 3), Tile(128, 256, 4, 3))),
    (6, Tiles(16, Tile(64, 256, 2, 3), Tile(128, 128, 4, 4))),
    (9, Tiles(32, Tile(64, 128, 4, 3, joined=True), Tile(128, 128, 4, 3, joined=True))),
    (40, Tiles(64, Tile(64, 128, 4, 3, joined=True), Tile(128, 128, 4, 3, joined=True))),
    (80, Tiles(128, Tile(128, 128, 8, 3, joined=True), Tile(256, 128, 8, 3, joined=True))),
)
_DENSE: Final = (
    (0, Tiles(16, Tile(64, 128, 4, 3, shares=4), Tile(64, 128, 4, 4))),
    (5, Tiles(16, Tile(32, 128, 4, 4), Tile(32, 128, 4, 4))),
    (65, Tiles(64, Tile(64, 64, 4, 4), Tile(64, 64, 4, 4))),
)
"""One expert that every token uses: small while tokens are few, so that there are programs enough."""
DENSE_WIDE: Final = 512
"""Tokens beyond which it has the tiles of routed experts."""
TABLE: Final = {0: _PLAIN, 1: _FP8, 2: _NVFP4}
"""By `KIND` of the kernels: (pairs an expert from which on, tiles), growing."""


def tiles_for(kind: int, pairs: int, experts: int, hopper: bool) -> Tiles:
    """The tiles for this many pairs spread over this many experts."""
    share = pairs / experts
    return _fitting([tiles for least, tiles in TABLE[kind] if least <= share][-1], hopper)


def dense_tiles(tokens: int, hopper: bool) -> Tiles:
    """The tiles of one expert that every token uses."""
    if tokens > DENSE_WIDE:
        return tiles_for(0, tokens, 1, hopper)
    return _fitting([tiles for least, tiles in _DENSE if least <= tokens][-1], hopper)


def for_float32(tiles: Tiles, least: int) -> Tiles:
    """The same for activations of four bytes, which need twice the room: steps of half as many columns, but `least`."""
    gate_up, down = (replace(tile, step=max(tile.step // 2, least)) for tile in (tiles.gate_up, tiles.down))
    return Tiles(tiles.rows, gate_up, down)


def _fitting(tiles: Tiles, hopper: bool) -> Tiles:
    """Elsewhere than on Hopper two stages, which take up to 64 KiB, without its way of loading."""
    if hopper:
        return tiles
    gate_up, down = (replace(tile, stages=2, tma=False) for tile in (tiles.gate_up, tiles.down))
    return Tiles(tiles.rows, gate_up, down)
