"""Logits to token ids.

A row's token is a function of its logits, its sampling settings, its seed and the token's position; never of the
rows beside it. Each draw takes one number in [0, 1) from a hash of (seed, position) and looks it up in the
cumulative weights of the tokens that the filters kept, in order of token id.

Filters apply to softmax(logits / temperature), in this order: `top_k` keeps the k largest, of equal ones those with
the lowest ids; `top_p` keeps the fewest largest of those that together hold that share of what top_k kept; `min_p`
keeps those with at least that share of the largest one's probability. The most probable token always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.ops import Ops

GREEDY_BELOW = 1e-6
"""Temperatures under this one mean: take the largest logit."""


@dataclass(frozen=True)
class SamplingColumns:
    """Settings of the R rows that sample in a step, one array entry a row."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.int64]
    """0 keeps all."""
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """Position of the token to draw, counted from 0 at the row's first prompt token."""
    suppressed: Sequence[tuple[int, Sequence[int]]] = ()
    """(row among the R, ids that it must not draw)."""


def sample(logits: Tensor, columns: SamplingColumns, ops: Ops) -> Tensor:
    """Draw one token a row: [R, V] -> [R] int64. `logits` may be overwritten.

    Raises: ProcessLost if a row has a logit that is not finite, for then nothing it would say means anything.
    """
    _check_finite(logits)
    for row, ids in columns.suppressed:
        logits[row, list(ids)] = -torch.inf
    greedy = columns.temperature < GREEDY_BELOW
    if greedy.all():
        return ops.sample_greedy(logits)
    chosen = ops.sample_greedy(logits) if greedy.any() else torch.empty(len(greedy), dtype=torch.int64)
    drawing = np.flatnonzero(~greedy)
    rows = torch.from_numpy(drawing).to(logits.device)
    chosen = chosen.to(logits.device)
    chosen[rows] = _draw(logits[rows].float(), columns, drawing)
    return chosen


def _check_finite(logits: Tensor) -> None:
    sums = logits.sum(dim=-1, dtype=torch.float32)
    if not sums.isfinite().all():
        rows = (~logits.isfinite().all(dim=-1)).nonzero()[:, 0].tolist()
        raise ProcessLost(f"logits of {len(rows)} of {logits.shape[0]} sampled rows are not finite: rows {rows[:8]}")


def _draw(logits: Tensor, columns: SamplingColumns, rows: NDArray[np.int64]) -> Tensor:
    """Inverse of the cumulative distribution at each row's number. logits [D, V] are those of `rows`."""

    def column(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values[rows]).to(logits.device)[:, None]

    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column(columns.temperature).float()
    weights = scaled.exp()
    min_p = columns.min_p[rows]
    if (min_p > 0).any():
        weights = weights.masked_fill(weights < column(columns.min_p).float(), 0.0)
    vocabulary = logits.shape[1]
    filtered = ((columns.top_k[rows] > 0) & (columns.top_k[rows] < vocabulary)) | (columns.top_p[rows] < 1.0)
    if filtered.any():
        at = torch.from_numpy(np.flatnonzero(filtered)).to(logits.device)
        kept = _top(scaled[at], column(columns.top_k)[at], column(columns.top_p)[at])
        weights[at] = weights[at].masked_fill(~kept, 0.0)
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    numbers = torch.from_numpy(uniform(columns.seed[rows], columns.position[rows])).to(logits.device)[:, None]
    # A product that rounds up to the total would point past the last token.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens top_k and then top_p keep: scaled [D, V], top_k and top_p [D, 1] -> [D, V] bool."""
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scaled.shape[1], device=scaled.device)[None, :]
    in_k = (top_k <= 0) | (ranks < top_k)
    mass = ranked.double().exp().masked_fill(~in_k, 0.0)
    before = mass.cumsum(dim=-1) - mass
    in_p = (before < top_p * mass.sum(dim=-1, keepdim=True)) | (ranks == 0)
    return torch.zeros_like(in_k).scatter_(-1, ids, in_k & in_p)


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
