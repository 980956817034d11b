"""Logits to token ids without asking the device for anything: the rules of `srt/worker/sampler.py`, in torch.

What a row wants is known on the host, so a batch that only takes largest logits costs nothing more; where a token
stands, which its noise depends on, is known on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from srt.configs.memory import DRAWN_ROWS
from srt.layers.ops import Ops
from srt.messages import RowStart, SamplingSpec
from srt.worker.device.layout import Ints, offsets_within, upload
from srt.worker.sampler import BLOCK, GREEDY_BELOW

PLAIN: Final = SamplingSpec(temperature=0.0)


@dataclass(frozen=True)
class Draws:
    """The D wanted logits of a step that are drawn from, and how; on the device."""

    at: Tensor
    """[D] which of the step's wanted logits, int64."""
    integers: Tensor
    """[3, D] int64: top_k, the seed's bits, and place behind the row's known tokens."""
    reals: Tensor
    """[3, D] float64: temperature, top_p, min_p."""
    filtered: bool
    """Whether any has a top_k or top_p."""

    def parts(self, most: int) -> Iterator[Draws]:
        """At most so many at a time: drawing takes a dozen times the memory of the logits."""
        for start in range(0, len(self.at), most):
            part = slice(start, start + most)
            yield Draws(self.at[part], self.integers[:, part], self.reals[:, part], self.filtered)


class RowSampling:
    """How each row samples: host memory, written by plans."""

    def __init__(self, device: torch.device, rows: int) -> None:
        self._device = device
        self._specs = [PLAIN] * rows

    def apply(self, starts: Sequence[RowStart]) -> None:
        """Rows begin anew."""
        for start in starts:
            self._specs[start.row] = start.sampling

    def greedy(self, rows: Sequence[int]) -> bool:
        """Whether all of these rows take the largest logit."""
        return all(self._specs[row].temperature < GREEDY_BELOW for row in rows)

    def draws(self, rows: Ints, widths: Ints) -> Draws | None:
        """Those of the logits of rows with `widths` wanted logits each that are drawn from; None if there are none."""
        row_of, offsets = np.repeat(rows, widths), offsets_within(widths)
        at = [place for place, row in enumerate(row_of) if self._specs[row].temperature >= GREEDY_BELOW]
        if not at:
            return None
        specs = [self._specs[row_of[place]] for place in at]
        seeds = np.array([spec.seed & 0xFFFF_FFFF_FFFF_FFFF for spec in specs], np.uint64)
        reals = np.array(
            [[s.temperature for s in specs], [s.top_p for s in specs], [s.min_p for s in specs]], np.float64
        )
        top_k = np.array([spec.top_k for spec in specs], np.int64)
        columns = [np.array(at), top_k, seeds.view(np.int64), offsets[at], reals.ravel().view(np.int64)]
        places, k, seed, place, bits = upload(columns, self._device)
        filtered = bool((top_k > 0).any() or (reals[1] < 1.0).any())
        wide = bits.view(torch.float64).view(len(reals), -1)
        return Draws(places, torch.stack([k, seed, place]), wide, filtered)


def sample(logits: Tensor, positions: Tensor, draws: Draws | None, ops: Ops) -> tuple[Tensor, Tensor]:
    """One token for each of the wanted logits [L, V]: (tokens [L] int64, [L] int32, 0 where logits are not finite).

    Those that nothing is drawn from take the largest. `positions` [L]: of the tokens to sample.
    """
    tokens, finite = ops.largest(logits)
    if draws is None:
        return tokens, finite
    for some in draws.parts(DRAWN_ROWS):
        tokens = tokens.index_copy(0, some.at, draw(logits[some.at].float(), positions[some.at], some))
    return tokens, finite


def draw(logits: Tensor, positions: Tensor, draws: Draws) -> Tensor:
    """Inverse of the cumulative distribution at each row's number: logits [D, V] float32 -> [D]."""
    top_k, seeds, _ = draws.integers.unbind()
    temperature, top_p, min_p = draws.reals.unbind()
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / temperature.float()[:, None]
    weights = _padded(scaled.exp())
    weights = torch.where(weights < min_p[:, None], 0.0, weights)
    if draws.filtered:
        weights[:, : logits.shape[1]] *= _top(scaled, top_k, top_p)
    sums = _block_sums(weights)
    total = sums[:, -1]
    numbers = uniform(seeds, positions) * total
    # A product that rounds up to the total would point past the last token.
    return _sums_below(weights, sums, torch.minimum(numbers, torch.nextafter(total, torch.zeros_like(total))))


def _top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens top_k and then top_p keep, of equal ones the lowest ids: [D, V] -> [D, V] bool."""
    size = scaled.shape[1]
    ranked = scaled.sort(dim=1, descending=True).values
    counts = torch.where((top_k > 0) & (top_k < size), top_k, size)
    weights = _padded(ranked.exp())
    ranks = torch.arange(weights.shape[1], device=scaled.device)
    weights = torch.where(ranks >= counts[:, None], 0.0, weights)
    sums = _block_sums(weights)
    share = top_p * sums[:, -1]
    reaching = _sums_below(weights, sums, torch.nextafter(share, torch.zeros_like(share))) + 1
    counts = torch.where(top_p < 1.0, torch.minimum(counts, reaching), counts)
    smallest = ranked.gather(1, counts[:, None] - 1)
    kept, equal = scaled > smallest, scaled == smallest
    wanted = counts - kept.sum(dim=1)
    return kept | (equal & (equal.cumsum(dim=1) <= wanted[:, None]))


def _padded(weights: Tensor) -> Tensor:
    """[D, V] -> [D, W]: zeros up to whole blocks."""
    return torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK))


def _block_sums(weights: Tensor) -> Tensor:
    """Running sums at the ends of blocks: [D, W] -> [D, W / BLOCK] float64."""
    return weights.view(len(weights), -1, BLOCK).sum(dim=2, dtype=torch.float64).cumsum(dim=1)


def _sums_below(weights: Tensor, sums: Tensor, target: Tensor) -> Tensor:
    """How many running sums of a row are at most its target [D]: the index of the weight that takes it beyond."""
    blocks = sums.shape[1]
    block = (sums <= target[:, None]).sum(dim=1).clamp(max=blocks - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    rows = torch.arange(len(weights), device=weights.device)
    inside = weights.view(len(weights), blocks, BLOCK)[rows, block]
    within = (inside.cumsum(dim=1, dtype=torch.float64) <= (target - before)[:, None]).sum(dim=1)
    # Rounding may put the target past its block's own sum: then it means the block's last weight.
    last = BLOCK - 1 - (inside.flip(1) > 0).int().argmax(dim=1)
    return block * BLOCK + torch.minimum(within, last)


def _signed(bits: int) -> int:
    """A 64-bit pattern as the signed number that torch holds it in."""
    return bits - (1 << 64) if bits >> 63 else bits


_GAMMA, _MIX_A, _MIX_B = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count with zeros coming in, which torch's own shift of signed numbers has not."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _scramble(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = x + _GAMMA
    x = (x ^ _shifted(x, 30)) * _MIX_A
    x = (x ^ _shifted(x, 27)) * _MIX_B
    return x ^ _shifted(x, 31)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, position), int64 -> float64: the bits of `srt.worker.sampler.uniform`."""
    return _shifted(_scramble(_scramble(seeds) ^ positions), 11).double() * 2.0**-53
