"""Cuts an image into the global view and the crops, as the vendor's code does, and names its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
GLOBAL_SIDE, CROP_SIDE, SIDE_MAX = 728, 504, 3024
GLOBAL_TOKENS, CROP_TOKENS = 169, 81
MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
STD: Final = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """How one image is cut: the size it is resized to, the window, and the grid of crops."""

    padded: bool
    size: tuple[int, int]
    canvas: tuple[int, int]
    window: int
    columns: int
    rows: int

    @property
    def crops(self) -> int:
        """Number of crops."""
        return self.columns * self.rows if self.window else 0


def plan(width: int, height: int) -> Layout:
    """Plan the crops of an image from its size alone. Source: step 1 to 5 of the vendor's algorithm."""
    padded = min(width, height) < 32 and max(width, height) / min(width, height) > 4
    if padded:
        width = height = max(width, height)
    if max(width, height) > SIDE_MAX:
        scale = SIDE_MAX / max(width, height)
        width, height = int(width * scale), int(height * scale)
    long, short = max(width, height), min(width, height)
    if long <= GLOBAL_SIDE:
        window = short if long / short > 1.5 else 0
    else:
        window = min(short, CROP_SIDE) if long / short > 4 else CROP_SIDE
    if not window:
        return Layout(padded, (width, height), (width, height), 0, 0, 0)
    canvas = (_snap(width, window), _snap(height, window))
    return Layout(padded, (width, height), canvas, window, max(1, canvas[0] // window), max(1, canvas[1] // window))


def _snap(side: int, window: int) -> int:
    if side < window:
        return side
    whole, rest = divmod(side, window)
    return window * (whole + (rest / window > 0.2))


def cut(image: Image.Image) -> tuple[Layout, Pixels, list[Pixels]]:
    """Return the layout, the global view [728, 728, 3] and the crops [504, 504, 3] as bytes."""
    image = image.convert("RGB")
    layout = plan(*image.size)
    if layout.padded:
        side = max(image.size)
        square = Image.new("RGB", (side, side))
        square.paste(image, (0, 0))
        image = square
    image = _resized(image, layout.size)
    whole = np.asarray(_resized(image, (GLOBAL_SIDE, GLOBAL_SIDE)))
    crops = []
    if layout.window:
        canvas, window = _resized(image, layout.canvas), layout.window
        for row in range(layout.rows):
            for column in range(layout.columns):
                x, y = column * window, row * window
                # A crop that leaves the canvas is filled with black.
                tile = canvas.crop((x, y, x + window, y + window))
                crops.append(np.asarray(_resized(tile, (CROP_SIDE, CROP_SIDE))))
    return layout, whole, crops


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def image_tokens(layout: Layout, ids: dict[str, int]) -> list[int]:
    """Return what one `<im_patch>` of the prompt becomes: the crops row by row, then the global view."""
    patch = ids["<im_patch>"]
    tokens: list[int] = []
    for row in range(layout.rows):
        for _ in range(layout.columns):
            tokens += [ids["<patch_start>"], *[patch] * CROP_TOKENS, ids["<patch_end>"]]
        if row < layout.rows - 1:
            tokens.append(ids["<patch_newline>"])
    return [*tokens, ids["<im_start>"], *[patch] * GLOBAL_TOKENS, ids["<im_end>"]]
