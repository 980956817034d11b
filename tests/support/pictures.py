"""Pictures made by a formula, and files of them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from srt.configs.plan import ImageConfig
from srt.tokenizer.image_jobs import ImageLimits

STEP = ImageConfig(
    image_token_id=128001,
    view_size=728,
    view_tokens=169,
    crop_size=504,
    crop_tokens=81,
    max_size=3024,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
"""The published checkpoint."""
ROOMY = ImageLimits(bytes=1 << 30, pixels=1 << 27, tokens=262_144)


def pattern(width: int, height: int, shift: int = 0) -> NDArray[np.uint8]:
    """Ramps, curves and a checkerboard: [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width] + shift
    waves = (x * 7 + y * 3 + (x * y) // 5) % 256
    curves = (x * x // 11 + y * 5) % 256
    board = ((x // 16 + y // 16) % 2) * 200 + (x + y) % 56
    return np.stack([waves, curves, board], -1).astype(np.uint8)


def picture(width: int, height: int, shift: int = 0) -> Image.Image:
    """`pattern` as an image."""
    return Image.fromarray(pattern(width, height, shift))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"compress_level": 0} if kind == "PNG" else {}) | options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
