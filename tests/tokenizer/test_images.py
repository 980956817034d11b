"""Image files to views: the published arithmetic and that of transformers, file formats, and hostile files."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from srt.errors import ServingError
from srt.tokenizer.image_jobs import ImageLimits
from srt.tokenizer.images import Views, make_views
from srt.tokenizer.layout import plan_layout
from tests.support.pictures import ROOMY, STEP, file_of, picture

Pixels = NDArray[np.uint8]

HUGGING_FACE = {
    (300, 200): "21df727e4548a22b", (728, 728): "3d10dec70c33655d", (500, 300): "2e5c140daf99410c",
    (300, 700): "3f5ab58922248b1d", (729, 729): "3921f26f73405c2c", (1024, 768): "798d96395df01e73",
    (1920, 1080): "65033ece77d0c9e0", (800, 300): "d2952c6d3390e3c3", (2000, 400): "1cbac788df4494f9",
    (3000, 200): "5673ddc369065bab", (4000, 3000): "791c43393d037702", (610, 1210): "16ccf389e1e645b4",
    (504, 2100): "3d56b236ddb964aa", (1600, 1000): "f48f9d359164fceb", (100, 20): "ee6ac7af2936a312",
    (20, 10): "736078a3aa68be9b", (660, 300): "1df92fa1ad129d30", (5000, 100): "c7738998ae5d0b9c",
    (3, 900): "31bed85a00cf161c", (1, 1): "64f553b79885bf55", (1009, 505): "c7d5216fe87713e0",
    (3100, 31): "976a2de6935f8352", (728, 400): "5846647d38100f03",
}  # fmt: skip
"""First half of the key of the views that transformers 5.23's Step3p7ImageProcessor makes of `picture(w, h)`, taken
with torch 2.13 and torchvision 0.28 on a CPU with AVX-512, where it resizes 8-bit images as such."""


def views_of(image: Image.Image, rule: Any = "vendor", kind: str = "PNG", **options: Any) -> Views:
    return make_views(file_of(image, kind, **options), STEP, ROOMY, rule)


def refusal(data: bytes, limits: ImageLimits = ROOMY) -> str:
    with pytest.raises(ServingError) as caught:
        make_views(data, STEP, limits, "vendor")
    assert caught.value.status == 400
    return caught.value.text


ONE_LEVEL = 1.01
"""Half a level is lost after the columns and half after the rows; weights are rounded too."""


# --- arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", HUGGING_FACE, ids=str)
def test_views_of_the_hf_rule_are_those_of_its_processor_bit_by_bit(size: tuple[int, int]) -> None:
    assert views_of(picture(*size), "hf").key().hex()[:16] == HUGGING_FACE[size]


def torch_resized(image: Pixels, width: int, height: int) -> torch.Tensor:
    """Bilinear, antialiased, in float32: [H, W, 3] -> [height, width, 3] in 0 to 255."""
    whole = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(whole, size=(height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


def levels_apart(image: Pixels, expected: torch.Tensor) -> float:
    """Largest difference of a pixel's channel."""
    return (torch.from_numpy(image.copy()).float() - expected).abs().max().item()


@pytest.mark.parametrize(
    "size", [(300, 200), (500, 300), (300, 700), (1024, 768), (800, 300), (2000, 400), (100, 20), (20, 10), (660, 300),
             (900, 40), (3100, 400)]
)  # fmt: skip
def test_views_of_the_vendor_rule_are_within_a_level_of_the_published_float_arithmetic(size: tuple[int, int]) -> None:
    """The published code resizes tiles as floats; ours are 8-bit, so up to one level of 255 is lost."""
    image = picture(*size)
    views, layout = views_of(image), plan_layout(*size, STEP, "vendor")
    padded = Image.new("RGB", layout.padded)
    padded.paste(image)
    shrunk = padded.resize(layout.shrunk, Image.Resampling.BILINEAR)
    expected = torch_resized(np.asarray(shrunk), 728, 728)
    assert levels_apart(views.view[0], expected) <= ONE_LEVEL
    if layout.crops:
        canvas = np.asarray(shrunk.resize(layout.canvas, Image.Resampling.BILINEAR))
        window = layout.window
        filled = np.zeros((layout.rows * window, layout.columns * window, 3), dtype=np.uint8)
        filled[: canvas.shape[0], : canvas.shape[1]] = canvas
        for at in range(layout.crops):
            top, left = at // layout.columns * window, at % layout.columns * window
            expected = torch_resized(filled[top : top + window, left : left + window], 504, 504)
            assert levels_apart(views.crops[at], expected) <= ONE_LEVEL


def test_a_short_tile_ends_in_black_with_the_vendor_rule_and_is_stretched_with_the_other() -> None:
    image = Image.new("RGB", (800, 300), (90, 120, 250))
    vendor, hf = views_of(image), views_of(image, "hf")
    assert vendor.crops.shape == hf.crops.shape == (2, 504, 504, 3)
    assert (vendor.crops[:, :300] == (90, 120, 250)).all()
    assert (vendor.crops[:, 300:] == 0).all()
    assert (hf.crops == (90, 120, 250)).all()


def test_the_key_depends_on_pixels_and_layout_only() -> None:
    image = picture(500, 300)
    key = views_of(image).key()
    assert views_of(image, kind="WEBP", lossless=True).key() == key
    assert views_of(picture(500, 300, shift=1)).key() != key
    assert make_views(file_of(image), STEP, ROOMY, "vendor", crops=False).key() != key
    wide, high = Views(2, 1, np.zeros((2, 504, 504, 3), np.uint8), np.zeros((1, 728, 728, 3), np.uint8)), None
    high = Views(1, 2, wide.crops, wide.view)
    assert wide.key() != high.key()


# --- files -----------------------------------------------------------------------------------------------


def same(views: Views, other: Views, levels: int = 0) -> bool:
    difference = np.abs(views.view.astype(int) - other.view).max()
    return bool(difference <= levels and views.crops.shape == other.crops.shape)


def test_lossless_formats_give_equal_views() -> None:
    image = picture(64, 48)
    expected = views_of(image)
    assert same(views_of(image, kind="WEBP", lossless=True), expected)
    grey = image.convert("L")
    assert same(views_of(grey), views_of(grey.convert("RGB")))
    palette = image.quantize(64)
    assert same(views_of(palette), views_of(palette.convert("RGB")))
    assert same(views_of(palette, kind="GIF"), views_of(palette.convert("RGB")))


def test_jpeg_files_are_read_in_colour_grey_and_print_colours() -> None:
    image = Image.new("RGB", (64, 48), (200, 40, 90))
    for mode in ("RGB", "CMYK"):
        assert same(views_of(image.convert(mode), kind="JPEG", quality=95), views_of(image), levels=6)
    assert same(views_of(image.convert("L"), kind="JPEG", quality=95), views_of(image.convert("L")), levels=2)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
        assert make_views(data, STEP, ROOMY, "vendor").view[0, 300, 300, 0] > 240


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_before_it_is_cut(orientation: int) -> None:
    upright = picture(500, 300)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    views = views_of(stored, exif=exif)
    assert (views.columns, views.rows) == (2, 1)
    assert views.key() == views_of(upright).key()


def test_what_is_transparent_becomes_white_and_with_the_hf_rule_shows_its_colour() -> None:
    clear = Image.new("RGBA", (100, 100), (10, 20, 30, 0))
    half = Image.new("RGBA", (100, 100), (0, 0, 0, 127))
    assert (views_of(clear).view == 255).all()
    assert (views_of(clear, "hf").view == (10, 20, 30)).all()
    assert (views_of(half).view == 128).all()
    palette = Image.new("P", (100, 100), 0)
    palette.putpalette([9, 9, 9])
    assert (views_of(palette, transparency=0).view == 255).all()
    grey = Image.new("LA", (100, 100), (77, 255))
    assert (views_of(grey).view == 77).all()


def test_sixteen_bit_files_keep_their_brightness() -> None:
    grey = Image.fromarray(np.full((40, 40), 0x80FF, dtype=np.uint16))
    assert (views_of(grey).view == 0x80).all()
    colour = b"".join(b"\0" + struct.pack(">HHH", 0x1000, 0x8000, 0xF000) * 40 for _ in range(40))
    assert (make_views(png(40, 40, colour, depth=16), STEP, ROOMY, "vendor").view == (0x10, 0x80, 0xF0)).all()


# --- hostile files ---------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """A PNG file with any header over any image data, in RGB."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                    for kind, data in chunks)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = png(60_000, 60_000, b"\0" * 1_000_000)
    assert len(bomb) < 3_000
    text = refusal(bomb, ImageLimits(bytes=1 << 20, pixels=1 << 26, tokens=262_144))
    assert text == "the image is 60000 x 60000 = 3600000000 pixels, the limit is 67108864 (--max-image-pixels)"


def test_an_image_of_a_hundred_thousand_pixels_width_is_refused() -> None:
    assert "100000 x 30 pixels; a side may have 65535" in refusal(png(100_000, 30, b""))


def test_a_sliver_is_refused_if_its_square_were_too_large() -> None:
    text = refusal(png(60_000, 10, b""))
    assert "padded to a square of 3600000000 pixels, the limit is 134217728" in text


def test_a_strip_that_would_be_cut_into_thousands_of_crops_is_refused() -> None:
    assert "cut into 3024 crops, the limit is 128" in refusal(png(60_000, 33, b""))


def test_an_image_that_alone_exceeds_the_context_is_refused_by_its_header() -> None:
    with pytest.raises(ServingError, match="takes 2665 tokens, the context length is 2048 tokens"):
        make_views(png(4000, 3000, b""), STEP, ImageLimits(1 << 20, 1 << 26, 2048), "vendor")


def test_a_file_with_too_many_bytes_is_refused_unopened() -> None:
    text = refusal(b"\0" * 1001, ImageLimits(bytes=1000, pixels=1 << 26, tokens=262_144))
    assert text == "the image has 1001 bytes, the limit is 1000 (--max-image-bytes)"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = file_of(picture(300, 200), kind)
    assert refusal(data[: int(len(data) * share)]).startswith("the image ")


def test_other_formats_and_garbage_are_refused() -> None:
    for data in (b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7 " * 50, bytes(range(256))):
        assert refusal(data).startswith("the image ")
    for kind in ("BMP", "TIFF", "PPM", "ICO", "EPS"):
        assert "not a readable PNG, JPEG, WebP or GIF file" in refusal(file_of(picture(32, 32), kind))


def test_every_damaged_byte_is_survived() -> None:
    data = bytearray(file_of(picture(40, 30), "JPEG"))
    rng = np.random.default_rng(5)
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(2, len(data), 3):
            broken[at] = rng.integers(256)
        try:
            views = make_views(bytes(broken), STEP, ROOMY, "vendor")
        except ServingError as error:
            assert error.status == 400
        else:
            assert views.view.shape == (1, 728, 728, 3)
