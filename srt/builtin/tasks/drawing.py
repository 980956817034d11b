"""Draws the pictures of the image tasks: one shape or one digit on a plain background."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from srt.builtin.tasks.example import Picture
from srt.builtin.tasks.words import COLOURS, SHAPES

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SIDE_MIN, SIDE_MAX, ASPECT_MAX = 48, 1200, 3.0
_BASE: Final[dict[str, Rgb]] = {
    "red": (225, 30, 35),
    "green": (35, 160, 60),
    "blue": (35, 75, 220),
    "yellow": (245, 220, 30),
    "orange": (250, 140, 20),
    "purple": (135, 45, 165),
    "black": (12, 12, 14),
}
_SEGMENTS: Final = {
    "0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc",
    "5": "afgcd", "6": "afgedc", "7": "abc", "8": "abcdefg", "9": "abcdfg",
}  # fmt: skip
_SEGMENT_LINES: Final[dict[str, tuple[Point, Point]]] = {
    "a": ((0, 0), (1, 0)), "b": ((1, 0), (1, 1)), "c": ((1, 1), (1, 2)), "d": ((0, 2), (1, 2)),
    "e": ((0, 1), (0, 2)), "f": ((0, 0), (0, 1)), "g": ((0, 1), (1, 1)),
}  # fmt: skip
_DOTS: Final = {
    "0": "0e 11 13 15 19 11 0e", "1": "04 0c 04 04 04 04 0e", "2": "0e 11 01 02 04 08 1f", "3": "1f 02 04 02 01 11 0e",
    "4": "02 06 0a 12 1f 02 02", "5": "1f 10 1e 01 01 11 0e", "6": "06 08 10 1e 11 11 0e", "7": "1f 01 02 04 08 08 08",
    "8": "0e 11 11 0e 11 11 0e", "9": "0e 11 11 0f 01 02 0c",
}  # fmt: skip


def _arc(centre: Point, radius: Point, start: float, end: float) -> list[Point]:
    """Return points of an ellipse's arc; degrees, 0 to the right, growing clockwise on the screen."""
    count = 14
    angles = [math.radians(start + (end - start) * index / count) for index in range(count + 1)]
    return [(centre[0] + radius[0] * math.cos(a), centre[1] + radius[1] * math.sin(a)) for a in angles]


# Pen strokes in a box 1 wide and 1.6 high.
_STROKES: Final[dict[str, list[list[Point]]]] = {
    "0": [_arc((0.5, 0.8), (0.45, 0.8), -90, 270)],
    "1": [[(0.2, 0.35), (0.55, 0.0), (0.55, 1.6)]],
    "2": [[*_arc((0.5, 0.42), (0.42, 0.42), -170, 40), (0.05, 1.6), (0.98, 1.6)]],
    "3": [_arc((0.48, 0.4), (0.42, 0.4), -160, 90), _arc((0.48, 1.18), (0.46, 0.42), -90, 160)],
    "4": [[(0.7, 1.6), (0.7, 0.0), (0.02, 1.1), (1.0, 1.1)]],
    "5": [[(0.9, 0.0), (0.18, 0.0), (0.12, 0.72), *_arc((0.48, 1.1), (0.46, 0.5), -130, 150)]],
    "6": [[(0.78, 0.0), (0.3, 0.5), (0.08, 1.1)], _arc((0.5, 1.14), (0.44, 0.46), 0, 360)],
    "7": [[(0.02, 0.0), (0.98, 0.0), (0.38, 1.6)]],
    "8": [_arc((0.5, 0.4), (0.36, 0.4), 0, 360), _arc((0.5, 1.2), (0.45, 0.4), 0, 360)],
    "9": [_arc((0.5, 0.46), (0.44, 0.46), 0, 360), [(0.94, 0.46), (0.86, 1.0), (0.45, 1.6)]],
}


def canvas_size(rng: random.Random) -> tuple[int, int]:
    """Return width and height: sides 48 to 1,200, aspect up to 3."""
    if rng.random() < 0.5:
        long = rng.randint(SIDE_MIN, SIDE_MAX)
    else:
        long = round(math.exp(rng.uniform(math.log(SIDE_MIN), math.log(SIDE_MAX))))
    aspect = 1.0 if rng.random() < 0.3 else rng.uniform(1.0, ASPECT_MAX) ** rng.choice((0.5, 1.0))
    short = max(SIDE_MIN, round(long / aspect))
    return (long, short) if rng.random() < 0.6 else (short, long)


def background(rng: random.Random, *, light: bool) -> Rgb:
    """Return a plain light or dark colour, nearly grey."""
    level = rng.randint(200, 255) if light else rng.randint(0, 60)
    if light and rng.random() < 0.3:
        return (255, 255, 255)
    return tuple(min(255, max(0, level + rng.randint(-12, 12))) for _ in range(3))  # type: ignore[return-value]


def shape_picture(rng: random.Random, colour: str, shape: str) -> Picture:
    """Draw one shape, any place, 20 to 90 % of the short side."""
    width, height = canvas_size(rng)
    light = colour == "black" or rng.random() < 0.65
    scale = 2 if max(width, height) <= 400 and rng.random() < 0.7 else 1
    image = Image.new("RGB", (width * scale, height * scale), background(rng, light=light))
    short = min(width, height)
    size = max(16.0, short * rng.uniform(0.2, 0.9)) * scale
    x = rng.uniform(size / 2, width * scale - size / 2)
    y = rng.uniform(size / 2, height * scale - size / 2)
    ink = _jitter(rng, _BASE[colour], 8 if colour == "black" else 18)
    pen = ImageDraw.Draw(image)
    turn = math.radians(rng.uniform(-15, 15)) if rng.random() < 0.5 else 0.0
    if shape == "circle":
        pen.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=ink)
    else:
        pen.polygon(_outline(shape, (x, y), size / 2, turn), fill=ink)
    if scale > 1:
        image = image.resize((width, height), Image.Resampling.BOX)
    return _finish(rng, image, {"colour": colour, "shape": shape})


def digit_picture(rng: random.Random, digit: str, fonts: Sequence[str] = ()) -> Picture:
    """Draw one digit with a font, a pen, segments or dots; `fonts` are files to draw from as well."""
    width, height = canvas_size(rng)
    light = rng.random() < 0.65
    ground = background(rng, light=light)
    ink = _ink(rng, ground)
    mask = _digit_mask(rng, digit, fonts)
    if rng.random() < 0.5:
        mask = mask.rotate(rng.uniform(-10, 10), resample=Image.Resampling.BILINEAR, expand=True)
    box = mask.getbbox()
    if box:
        mask = mask.crop(box)
    short = min(width, height)
    tall = max(20.0, short * rng.uniform(0.42, 0.92))
    wide = tall * mask.width / mask.height * rng.uniform(0.85, 1.2)
    shrink = min(1.0, 0.96 * width / wide, 0.96 * height / tall)
    size = (max(3, round(wide * shrink)), max(8, round(tall * shrink)))
    mask = mask.resize(size, Image.Resampling.BILINEAR)
    image = Image.new("RGB", (width, height), ground)
    place = (rng.randint(0, max(0, width - size[0])), rng.randint(0, max(0, height - size[1])))
    image.paste(ink, (*place, place[0] + size[0], place[1] + size[1]), mask)
    return _finish(rng, image, {"digit": digit})


def random_shape(rng: random.Random) -> Picture:
    """Draw any shape in any colour."""
    return shape_picture(rng, rng.choice(COLOURS), rng.choice(SHAPES))


def _outline(shape: str, centre: Point, radius: float, turn: float) -> list[Point]:
    radii: tuple[float, ...]
    if shape == "square":
        corners, start, radii = 4, math.pi / 4, (1.0,)
    elif shape == "triangle":
        corners, start, radii = 3, -math.pi / 2, (1.0,)
    else:
        corners, start, radii = 10, -math.pi / 2, (1.0, 0.42)
    angles = [start + turn + 2 * math.pi * index / corners for index in range(corners)]
    lengths = [radius * radii[index % len(radii)] for index in range(corners)]
    return [
        (centre[0] + length * math.cos(a), centre[1] + length * math.sin(a))
        for a, length in zip(angles, lengths, strict=True)
    ]


def _jitter(rng: random.Random, colour: Rgb, spread: int) -> Rgb:
    return tuple(min(255, max(0, level + rng.randint(-spread, spread))) for level in colour)  # type: ignore[return-value]


def _ink(rng: random.Random, ground: Rgb) -> Rgb:
    """Return a colour that stands out: at least 110 levels of luminance away."""
    while True:
        if rng.random() < 0.4:
            ink = rng.choice(((0, 0, 0), (255, 255, 255), *_BASE.values()))
        else:
            ink = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        if abs(_luminance(ink) - _luminance(ground)) > 110:
            return ink


def _luminance(colour: Rgb) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _digit_mask(rng: random.Random, digit: str, fonts: Sequence[str]) -> Image.Image:
    way = rng.random()
    if way < (0.6 if fonts else 0.4):
        return _font_mask(rng, digit, fonts)
    mask = Image.new("L", (200, 280), 0)
    pen = ImageDraw.Draw(mask)
    if way < 0.76:
        thick = rng.randint(8, 34)
        slant = rng.uniform(-0.15, 0.15)
        for stroke in _STROKES[digit]:
            points = [(45 + 110 * x - slant * 100 * (y - 0.8), 45 + 118 * y) for x, y in stroke]
            _pen_line(pen, points, thick)
    elif way < 0.88:
        thick, gap = rng.randint(10, 30), rng.randint(0, 8)
        for name in _SEGMENTS[digit]:
            (x0, y0), (x1, y1) = _SEGMENT_LINES[name]
            dx, dy = (gap if x0 != x1 else 0), (gap if y0 != y1 else 0)
            ends = [(50 + 100 * x0 + dx, 40 + 100 * y0 + dy), (50 + 100 * x1 - dx, 40 + 100 * y1 - dy)]
            _pen_line(pen, ends, thick)
    else:
        round_dots, cell = rng.random() < 0.5, 32
        inset = rng.randint(0, 6)
        for row, bits in enumerate(_DOTS[digit].split()):
            for column in range(5):
                if int(bits, 16) >> (4 - column) & 1:
                    x, y = 20 + column * cell, 20 + row * cell
                    box = (x + inset, y + inset, x + cell - inset, y + cell - inset)
                    (pen.ellipse if round_dots else pen.rectangle)(box, fill=255)
    return mask


def _pen_line(pen: ImageDraw.ImageDraw, points: list[Point], thick: int) -> None:
    pen.line(points, fill=255, width=thick, joint="curve")
    for x, y in (points[0], points[-1]):
        pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)


def _font_mask(rng: random.Random, digit: str, fonts: Sequence[str]) -> Image.Image:
    if fonts and rng.random() < 0.7:
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont = ImageFont.truetype(rng.choice(fonts), 180)
    else:
        font = ImageFont.load_default(180)
    mask = Image.new("L", (240, 300), 0)
    weight = rng.choice((0, 0, 0, 3, 6, 9))
    ImageDraw.Draw(mask).text((50, 20), digit, fill=255, font=font, stroke_width=weight)
    slant = rng.uniform(-0.25, 0.25) if rng.random() < 0.5 else 0.0
    return mask.transform(mask.size, Image.Transform.AFFINE, (1, slant, -150 * slant, 0, 1, 0))


def _finish(rng: random.Random, image: Image.Image, label: dict[str, str]) -> Picture:
    """Store the picture losslessly, or as a JPEG with its artefacts."""
    if rng.random() < 0.6:
        return Picture(pixels=image, label=label)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=rng.randint(40, 95))
    body = buffer.getvalue()
    decoded = Image.open(io.BytesIO(body)).convert("RGB")
    return Picture(pixels=decoded, format="JPEG", encoded=body, label=label)
