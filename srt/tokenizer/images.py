"""Bytes of an image file to the square views that the model sees, as 8-bit pixels. Runs in the image processes.

The file is not trusted: only four formats are opened, and size limits are checked on the header, before a pixel is
decoded. Source of the arithmetic: docs/images.md.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from srt.configs.plan import ImageConfig
from srt.errors import ErrorCode, ServingError
from srt.tokenizer import resample
from srt.tokenizer.image_jobs import ImageLimits, refuse
from srt.tokenizer.layout import Layout, Rule, image_token_count, plan_layout

Pixels = NDArray[np.uint8]

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
SIDE_PIXELS_MAX: Final = 65_535
"""What JPEG can express; other formats may not have longer sides either."""
CROPS_MAX: Final = 128
"""Beyond it lie only slivers more than 3,000 pixels long that shrink to a few pixels' height."""
WHITE: Final = (255, 255, 255)
ORIENTATION: Final = 0x0112
"""EXIF tag; values from 5 on swap width and height."""

Image.MAX_IMAGE_PIXELS = None  # Our own limit is checked on the header, with a message that names it.


@dataclass(frozen=True)
class Views:
    """Crops [n, crop_size, crop_size, 3], row by row, and the global view [1, view_size, view_size, 3]."""

    columns: int
    rows: int
    crops: Pixels
    view: Pixels

    def buffers(self) -> tuple[memoryview, memoryview]:
        """The bytes of crops and view."""
        return np.ascontiguousarray(self.crops).data, np.ascontiguousarray(self.view).data

    def key(self) -> bytes:
        """A hash of all that the model sees of the image: pixels and layout."""
        digest = hashlib.sha256(f"{self.columns} {self.rows}\n".encode())
        for buffer in self.buffers():
            digest.update(buffer)
        return digest.digest()


def make_views(data: bytes, config: ImageConfig, limits: ImageLimits, rule: Rule, *, crops: bool = True) -> Views:
    """Decode an image file and cut it.

    Raises: ServingError that says what is wrong with the file, or which limit it breaks.
    """
    if len(data) > limits.bytes:
        raise refuse(f"the image has {len(data)} bytes, the limit is {limits.bytes} (--max-image-bytes)")
    image = _open(data)
    width, height = _oriented_size(image)
    _check_size(width, height, limits)
    layout = plan_layout(width, height, config, rule, crops=crops)
    _check_layout(layout, (width, height), config, limits)
    rgb = _to_rgb(image, rule)
    if layout.padded != rgb.size:
        square = Image.new("RGB", layout.padded)
        square.paste(rgb)
        rgb = square
    return (_cut_like_vendor if rule == "vendor" else _cut_like_hf)(rgb, layout, config)


# --- reading ---------------------------------------------------------------------------------------------


def _open(data: bytes) -> Image.Image:
    if not data:
        raise refuse("the image has 0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # a decoder may fail in any way on a hostile file
        raise refuse(
            f"the image is not a readable PNG, JPEG, WebP or GIF file (it begins with {data[:8]!r})"
        ) from error


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as shown, from the header."""
    try:
        turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF data is no reason to refuse a picture; viewers ignore it too
        turned = False
    width, height = image.size
    return (height, width) if turned else (width, height)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if max(width, height) > SIDE_PIXELS_MAX:
        raise refuse(f"the image is {width} x {height} pixels; a side may have {SIDE_PIXELS_MAX}")
    if width * height > limits.pixels:
        raise refuse(
            f"the image is {width} x {height} = {width * height} pixels, the limit is {limits.pixels} "
            "(--max-image-pixels)"
        )


def _check_layout(layout: Layout, size: tuple[int, int], config: ImageConfig, limits: ImageLimits) -> None:
    padded = layout.padded[0] * layout.padded[1]
    if padded > limits.pixels:
        raise refuse(
            f"the image is {size[0]} x {size[1]} pixels; so thin an image is padded to a square of {padded} pixels, "
            f"the limit is {limits.pixels} (--max-image-pixels)"
        )
    if layout.crops > CROPS_MAX:
        raise refuse(
            f"the image is {size[0]} x {size[1]} pixels; so thin an image is cut into {layout.crops} crops, "
            f"the limit is {CROPS_MAX}"
        )
    tokens = image_token_count(layout.columns, layout.rows, config)
    if tokens > limits.tokens:
        raise ServingError(
            ErrorCode.PROMPT_TOO_LONG,
            f"the image is {size[0]} x {size[1]} pixels and takes {tokens} tokens, "
            f"the context length is {limits.tokens} tokens",
            "image_url",
        )


def _to_rgb(image: Image.Image, rule: Rule) -> Image.Image:
    """The first frame, upright, in 8-bit colour; what is transparent becomes white, or with `hf` is dropped."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a decoder may fail in any way on a hostile file
        raise refuse(f"the image cannot be decoded: {error}") from error
    if image.mode.startswith("I"):
        image = Image.fromarray((_deep(image) >> 8).astype(np.uint8))
    if rule == "hf" or not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _deep(image: Image.Image) -> NDArray[Any]:
    """Grey levels of 16 bits."""
    return np.clip(np.asarray(image).astype(np.int32), 0, 0xFFFF)


# --- cutting ---------------------------------------------------------------------------------------------


def _cut_like_vendor(image: Image.Image, layout: Layout, config: ImageConfig) -> Views:
    """Shrink first, then cut; a window that reaches beyond the canvas is filled up with black."""
    image = _pillow(image, layout.shrunk)
    view = _pillow(image, (config.view_size, config.view_size))
    crops: list[Pixels] = []
    if layout.window:
        canvas, window = _pillow(image, layout.canvas), layout.window
        for top in range(0, layout.rows * window, window):
            for left in range(0, layout.columns * window, window):
                crop = canvas.crop((left, top, left + window, top + window))
                crops.append(np.asarray(_pillow(crop, (config.crop_size, config.crop_size))))
    return _views(layout, crops, np.asarray(view), config)


def _pillow(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def _cut_like_hf(image: Image.Image, layout: Layout, config: ImageConfig) -> Views:
    """Canvas and crops come from the image in full size; a window that reaches beyond the canvas is stretched."""
    whole = np.asarray(image)
    view = resample.resize(resample.resize(whole, *layout.shrunk), config.view_size, config.view_size)
    crops: list[Pixels] = []
    if layout.window:
        canvas, window = resample.resize(whole, *layout.canvas), layout.window
        for top in range(0, layout.rows * window, window):
            for left in range(0, layout.columns * window, window):
                crop = canvas[top : top + window, left : left + window]
                crops.append(resample.resize(crop, config.crop_size, config.crop_size))
    return _views(layout, crops, view, config)


def _views(layout: Layout, crops: list[Pixels], view: Pixels, config: ImageConfig) -> Views:
    size = config.crop_size
    stacked = np.stack(crops) if crops else np.empty((0, size, size, 3), dtype=np.uint8)
    return Views(layout.columns, layout.rows, stacked, view[None])
