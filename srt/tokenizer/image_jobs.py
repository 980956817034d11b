"""What the tokenizer and its image processes say to each other over pipes."""

from __future__ import annotations

import msgspec

from srt.configs.plan import ImageConfig
from srt.errors import ErrorCode, ServingError
from srt.tokenizer.layout import Rule


class ImageLimits(msgspec.Struct, frozen=True):
    """What one image may cost. `pixels` counts those to decode, and those of a sliver padded to a square."""

    bytes: int
    pixels: int
    tokens: int


class Setup(msgspec.Struct, frozen=True):
    """First message: what is the same for all images."""

    config: ImageConfig
    limits: ImageLimits
    rule: Rule
    rundir: str
    seconds: float
    """What one image may take."""


class Job(msgspec.Struct, frozen=True):
    """An image file, or its base64 text. Without `crops` only the global view is made."""

    data: bytes
    base64: bool
    crops: bool


class Made(msgspec.Struct, frozen=True, tag=True):
    """The image's tiles are in the file that `key` names."""

    key: bytes
    columns: int
    rows: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The image cannot be served, and why."""

    code: ErrorCode
    text: str


Outcome = Made | Refused


def refuse(text: str) -> ServingError:
    """The error of an image that the client must change."""
    return ServingError(ErrorCode.INVALID_REQUEST, text, "image_url")
