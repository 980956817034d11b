"""Bilinear, antialiased resizing of 8-bit images in the arithmetic that transformers' processor runs on a CPU.

The filter is a triangle, widened when shrinking. Its weights are rounded to as many bits as fit 16-bit integers; the
columns are resized first and rounded to 8 bits, then the rows. Pillow keeps more bits and differs by one level here
and there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_WEIGHT_BITS = 15
_PRECISION_MAX = 22
_BLOCK_VALUES = 1 << 16


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """Shapes: image [H, W, 3] -> [height, width, 3]."""
    if image.shape[1] != width:
        image = np.ascontiguousarray(_resize_rows(np.ascontiguousarray(image.swapaxes(0, 1)), width).swapaxes(0, 1))
    return image if image.shape[0] == height else _resize_rows(image, height)


def _resize_rows(image: Pixels, count: int) -> Pixels:
    """[N, M, 3] -> [count, M, 3], a block of rows at a time so that the sums stay in the cache."""
    first, weights, precision = _taps(image.shape[0], count)
    flat = image.reshape(image.shape[0], -1)
    resized = np.empty((count, flat.shape[1]), dtype=np.uint8)
    block = max(1, _BLOCK_VALUES // flat.shape[1])
    for start in range(0, count, block):
        rows = slice(start, min(start + block, count))
        total = np.full((rows.stop - start, flat.shape[1]), 1 << (precision - 1), dtype=np.int32)
        for tap in range(weights.shape[1]):
            # A tap beyond the last row has weight 0; which row it reads does not matter.
            source = np.minimum(first[rows] + tap, image.shape[0] - 1)
            total += flat[source] * weights[rows, tap, None]
        total >>= precision
        np.clip(total, 0, 255, out=total)
        resized[rows] = total
    return resized.reshape(count, *image.shape[1:])


def _taps(size: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """For each output row the first input row it reads, and the integer weights of that row and the next ones.

    Returns first [count], weights [count, taps] and the number of fractional bits of the weights.
    """
    scale = size / count
    support = max(scale, 1.0)
    centre = scale * (np.arange(count) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), size)
    at = first[:, None] + np.arange(int((end - first).max()))
    distance = np.abs((at - centre[:, None] + 0.5) / support)
    exact: NDArray[Any] = np.where((distance < 1) & (at < end[:, None]), 1 - distance, 0.0)
    exact /= exact.sum(axis=1, keepdims=True)
    precision = 0
    while precision < _PRECISION_MAX and int(0.5 + exact.max() * (1 << (precision + 1))) < 1 << _WEIGHT_BITS:
        precision += 1
    return first, (0.5 + exact * (1 << precision)).astype(np.int32), precision
