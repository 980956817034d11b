"""Logits to token ids.

A row's token is a function of its logits, its sampling settings, its seed and the token's position; never of the
rows beside it. Each draw takes one number in [0, 1) from a hash of (seed, position) and looks it up in the
cumulative weights of the tokens that the filters kept, in order of token id.

Edits of single logits come first (`srt/worker/edits.py`). Filters apply to softmax(logits / temperature), in this
order: `top_k` keeps the k largest, of equal ones those with the lowest ids; `top_p` keeps the fewest largest of those
that together hold that share of what top_k kept; `min_p` keeps those with at least that share of the largest one's
probability. The most probable token always stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.ops import Ops
from srt.worker.edits import LogitEdits
from srt.worker.masks import Masks

Floats = NDArray[np.float32]

GREEDY_BELOW = 1e-6
"""Temperatures under this one mean: take the largest logit."""


@dataclass(frozen=True)
class SamplingColumns:
    """Settings of the R rows of logits of a step, one array entry each: a request with guesses has several."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.int64]
    """0 keeps all."""
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """Position of the token to draw, counted from 0 at the row's first prompt token."""
    edits: LogitEdits | None = None
    """What rows want changed in their logits before anything else."""


def sample(logits: Tensor, columns: SamplingColumns, ops: Ops, masks: Masks | None = None) -> Tensor:
    """Draw one token a row, one that the masks allow: [R, V] -> [R] int64. `logits` may be overwritten.

    Raises: ProcessLost if a row has a logit that is not finite, for then nothing it would say means anything.
    """
    _check_finite(logits)
    if columns.edits is not None:
        logits = columns.edits.apply(logits)
    if masks is not None:
        masks.apply(logits)
    drawing = np.flatnonzero(columns.temperature >= GREEDY_BELOW)
    if not len(drawing):
        return ops.sample_greedy(logits)
    rows = torch.from_numpy(drawing)
    drawn = torch.from_numpy(_draw(logits[rows].float().numpy(), columns, drawing))
    if len(drawing) == len(logits):
        return drawn
    return ops.sample_greedy(logits).index_copy_(0, rows, drawn)


def _check_finite(logits: Tensor) -> None:
    # One number for all rows: anything that is not finite makes their sum so.
    if not math.isfinite(logits.sum(dtype=torch.float32).item()):
        rows = (~logits.isfinite().all(dim=-1)).nonzero()[:, 0].tolist()
        raise ProcessLost(f"logits of {len(rows)} of {logits.shape[0]} sampled rows are not finite: rows {rows[:8]}")


def _draw(logits: Floats, columns: SamplingColumns, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Inverse of the cumulative distribution at each row's number. logits [D, V] float32 are those of `rows`."""
    temperature = columns.temperature[rows, None].astype(np.float32)
    top_k, top_p, min_p = columns.top_k[rows], columns.top_p[rows], columns.min_p[rows]
    with np.errstate(over="ignore"):  # far below the largest logit is minus infinity as good as any number
        scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    weights = _exponentials(scaled)
    if min_p.any():
        weights[weights < min_p[:, None]] = 0.0
    filtered = np.flatnonzero(((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1.0))
    if len(filtered):
        kept = _top(scaled[filtered], top_k[filtered], top_p[filtered])
        weights[filtered, : logits.shape[1]] *= kept
    sums = _block_sums(weights)
    total = sums[:, -1]
    # A product that rounds up to the total would point past the last token.
    target = np.minimum(uniform(columns.seed[rows], columns.position[rows]) * total, np.nextafter(total, 0.0))
    return _sums_below(weights, sums, target)


def _top(scaled: Floats, top_k: NDArray[np.int64], top_p: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which tokens top_k and then top_p keep: scaled [D, V], top_k and top_p [D] -> [D, V].

    Only values are sorted. What is kept is everything above the smallest kept value, and of those equal to it the
    lowest ids, until the count is full.
    """
    size = scaled.shape[1]
    ranked = np.sort(scaled, axis=1)[:, ::-1]
    counts = np.where((top_k > 0) & (top_k < size), top_k, size)
    if (top_p < 1.0).any():
        weights = _exponentials(ranked)
        weights[np.arange(weights.shape[1]) >= counts[:, None]] = 0.0
        sums = _block_sums(weights)
        reaching = _sums_below(weights, sums, np.nextafter(top_p * sums[:, -1], 0.0)) + 1
        counts = np.where(top_p < 1.0, np.minimum(counts, reaching), counts)
    smallest = np.take_along_axis(ranked, counts[:, None] - 1, axis=1)
    kept, equal = scaled > smallest, scaled == smallest
    wanted = counts - kept.sum(axis=1)
    if (equal.sum(axis=1) > wanted).any():
        equal &= equal.cumsum(axis=1) <= wanted[:, None]
    both: NDArray[np.bool_] = kept | equal
    return both


BLOCK = 64
"""Weights are summed in blocks, then the blocks: one running float64 sum over a vocabulary is ten times slower."""


def _exponentials(scaled: Floats) -> Floats:
    """exp(scaled), padded with zeros to whole blocks: [D, V] -> [D, W]."""
    weights = np.zeros((len(scaled), -(-scaled.shape[1] // BLOCK) * BLOCK), np.float32)
    np.exp(scaled, out=weights[:, : scaled.shape[1]])
    return weights


def _block_sums(weights: Floats) -> NDArray[np.float64]:
    """Running sums at the ends of blocks: [D, W] -> [D, W / BLOCK]."""
    sums: NDArray[np.float64] = weights.reshape(len(weights), -1, BLOCK).sum(axis=2, dtype=np.float64).cumsum(axis=1)
    return sums


def _sums_below(weights: Floats, sums: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many running sums of a row are at most its target: the index of the first weight that takes it beyond.

    That weight is never zero. Shapes: weights [D, W], their block sums, target [D] below the last of these.
    """
    rows = np.arange(len(weights))
    block = (sums <= target[:, None]).sum(axis=1)
    rest = target - np.where(block > 0, sums[rows, block - 1], 0.0)
    inside = weights.reshape(len(weights), -1, BLOCK)[rows, block]
    within = (inside.cumsum(axis=1, dtype=np.float64) <= rest[:, None]).sum(axis=1)
    # Rounding may put the target past its block's own sum: then it means the block's last weight.
    last = BLOCK - 1 - (inside[:, ::-1] > 0).argmax(axis=1)
    found: NDArray[np.int64] = block * BLOCK + np.minimum(within, last)
    return found


_GAMMA, _MIX_A, _MIX_B = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * _MIX_A
    x = (x ^ (x >> np.uint64(27))) * _MIX_B
    return x ^ (x >> np.uint64(31))


def uniform(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position), with 53 random bits."""
    bits = _scramble(_scramble(seed) ^ position.astype(np.uint64))
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers
