"""How an image is cut: a plan of sizes from width and height alone, and the tokens that stand for it in a prompt.

    width x height ─pad─▶ square if a sliver ─shrink─▶ at most max_size ─┬─▶ one global view, view_size square
                                                                        └─snap─▶ canvas, cut into windows: the crops

The published rule and that of transformers differ in how a side is rounded to whole windows; see docs/images.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from srt.configs.plan import ImageConfig

Rule = Literal["vendor", "hf"]

SLIVER_SIDE: Final = 32
SLIVER_RATIO: Final = 4
"""An image whose short side is below the one and whose sides differ by more than the other is padded to a square."""
ELONGATED_RATIO: Final = 1.5
"""An image that fits the global view is cropped only if its sides differ by more."""
STRIP_RATIO: Final = 4
"""A larger image whose sides differ by more is cut into windows as high as its short side."""
SNAP_FRACTION: Final = 0.2
"""A side is rounded up to whole windows if more than this part of a window is left over."""


@dataclass(frozen=True)
class Layout:
    """Sizes are (width, height) in pixels. `window` 0 means: no crops."""

    padded: tuple[int, int]
    shrunk: tuple[int, int]
    canvas: tuple[int, int]
    window: int
    columns: int
    rows: int

    @property
    def crops(self) -> int:
        """Number of crops."""
        return self.columns * self.rows


@dataclass(frozen=True)
class ImageTokenIds:
    """The six tokens that images are written with."""

    patch: int
    view_start: int
    view_end: int
    crop_start: int
    crop_end: int
    row_end: int


def plan_layout(width: int, height: int, config: ImageConfig, rule: Rule, *, crops: bool = True) -> Layout:
    """Where an image is cut; without `crops` it is shown in the global view alone.

    Source: docs/images.md.
    """
    if min(width, height) < SLIVER_SIDE and max(width, height) > SLIVER_RATIO * min(width, height):
        width = height = max(width, height)
    padded = (width, height)
    longest = max(width, height)
    if longest > config.max_size:
        scale = config.max_size / longest
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    window = _window(max(width, height), min(width, height), config) if crops else 0
    if window == 0:
        return Layout(padded, (width, height), (width, height), 0, 0, 0)
    canvas = _snap(width, window, rule), _snap(height, window, rule)
    columns, rows = (max(1, side // window) for side in canvas)
    return Layout(padded, (width, height), canvas, window, columns, rows)


def _window(long: int, short: int, config: ImageConfig) -> int:
    """Side of the square windows; 0 if the global view shows enough."""
    if long <= config.view_size:
        return short if long / short > ELONGATED_RATIO else 0
    return min(short, config.crop_size) if long / short > STRIP_RATIO else config.crop_size


def _snap(side: int, window: int, rule: Rule) -> int:
    """A side rounded to whole windows; one that is shorter than a window stays."""
    if side < window:
        return side
    # The published code compares the rounded quotient: 660 / 300 - 2 is a little more than 0.2, and counts as more.
    exceeds = {
        "vendor": side / window - side // window > SNAP_FRACTION,
        "hf": side % window > SNAP_FRACTION * window,
    }[rule]
    return window * (side // window + exceeds)


def image_token_count(columns: int, rows: int, config: ImageConfig) -> int:
    """Tokens of an image in a prompt: its features, two marks a view, and a mark after each row but the last."""
    return columns * rows * (config.crop_tokens + 2) + max(0, rows - 1) + config.view_tokens + 2


def image_token_ids(columns: int, rows: int, config: ImageConfig, ids: ImageTokenIds) -> list[int]:
    """The tokens of an image: crops row by row, then the global view."""
    crop = [ids.crop_start, *[ids.patch] * config.crop_tokens, ids.crop_end]
    row = crop * columns
    expanded: list[int] = []
    for index in range(rows):
        expanded += row if index == rows - 1 else [*row, ids.row_end]
    return [*expanded, ids.view_start, *[ids.patch] * config.view_tokens, ids.view_end]
