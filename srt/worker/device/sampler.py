"""Logits to token ids without asking the device for anything: the rules of `srt/worker/sampler.py`, in torch.

How rows sample lies on the device, written when they start; so does where a token stands, which its noise depends on.
The host knows the former too, and whether anything is to be drawn at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from srt.layers.ops import Ops
from srt.messages import RowStart, SamplingSpec
from srt.worker.device.layout import upload
from srt.worker.device.rows import DeviceStep
from srt.worker.sampler import BLOCK, GREEDY_BELOW

PLAIN: Final = SamplingSpec(temperature=0.0)


@dataclass(frozen=True)
class Settings:
    """How rows sample, one line each."""

    words: Tensor
    """[rows, 5] int64: top_k, the seed's bits, then those of temperature, top_p and min_p as float64."""

    @property
    def reals(self) -> Tensor:
        """The same memory as float64, where columns 2 to 4 are numbers."""
        return self.words.view(torch.float64)

    def write(self, rows: Sequence[int], specs: Sequence[SamplingSpec]) -> None:
        """Rows sample so from now on."""
        seeds = np.array([spec.seed & 0xFFFF_FFFF_FFFF_FFFF for spec in specs], np.uint64).view(np.int64)
        reals = np.array([[spec.temperature, spec.top_p, spec.min_p] for spec in specs], np.float64)
        top_k = np.array([spec.top_k for spec in specs], np.int64)
        lines = np.concatenate([top_k[:, None], seeds[:, None], reals.view(np.int64)], axis=1)
        numbers, words = upload([np.array(rows, np.int64), lines.ravel()], self.words.device)
        self.words[numbers] = words.view(lines.shape)


class RowSampling:
    """How each row samples: on the host and on the device, written by plans. The row of nobody takes the largest."""

    def __init__(self, device: torch.device, rows: int) -> None:
        self._specs = [PLAIN] * (rows + 1)
        self.settings = Settings(torch.zeros(rows + 1, 5, dtype=torch.int64, device=device))
        self.settings.write([rows], [PLAIN])

    def apply(self, starts: Sequence[RowStart]) -> None:
        """Rows begin anew."""
        changed = {start.row: start.sampling for start in starts if self._specs[start.row] != start.sampling}
        for row, spec in changed.items():
            self._specs[row] = spec
        if changed:
            self.settings.write(list(changed), list(changed.values()))

    def greedy(self, rows: Sequence[int]) -> bool:
        """Whether all of these rows take the largest logit."""
        return all(self._specs[row].temperature < GREEDY_BELOW for row in rows)

    def filtered(self, rows: Sequence[int]) -> bool:
        """Whether any of these rows has a top_k or top_p."""
        return any(self._specs[row].top_k > 0 or self._specs[row].top_p < 1.0 for row in rows)


class Sampler(Protocol):
    """Takes tokens out of logits as rows want it; nothing that it does waits for the device."""

    def sample(self, logits: Tensor, step: DeviceStep, settings: Settings, *, filtered: bool) -> tuple[Tensor, Tensor]:
        """One token for each of a step's wanted logits [L, V]: (tokens [L] int64, [L] int32, 0 where logits are not
        finite). Unless `filtered`, no row may have a top_k or top_p."""
        ...


class TorchSampler:
    """Plain torch."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def sample(self, logits: Tensor, step: DeviceStep, settings: Settings, *, filtered: bool) -> tuple[Tensor, Tensor]:
        """As the protocol says."""
        tokens, finite = self._ops.largest(logits)
        layout = step.layout
        rows, positions = step.emitting[layout.wanted_rows], step.known[layout.wanted_rows] + layout.wanted_offsets
        top_k, seeds = settings.words[rows, :2].unbind(dim=1)
        temperature, top_p, min_p = settings.reals[rows, 2:].unbind(dim=1)
        drawing = temperature >= GREEDY_BELOW
        warm = torch.where(drawing, temperature, 1.0).float()
        scaled = (logits.float() - logits.amax(dim=1, keepdim=True).float()) / warm[:, None]
        kept = _top(scaled, top_k, top_p) if filtered else None
        return torch.where(drawing, draw(scaled, uniform(seeds, positions), min_p, kept), tokens), finite


def draw(scaled: Tensor, numbers: Tensor, min_p: Tensor, kept: Tensor | None) -> Tensor:
    """Inverse of the cumulative distribution at each row's number.

    Shapes: scaled [D, V] float32, logits less their largest over the temperature; numbers and min_p [D] float64; kept
    [D, V] bool, None for all; -> [D].
    """
    weights = _padded(scaled.exp())
    weights = torch.where(weights < min_p[:, None], 0.0, weights)
    if kept is not None:
        weights[:, : scaled.shape[1]] *= kept
    sums = _block_sums(weights)
    total = sums[:, -1]
    # A product that rounds up to the total would point past the last token.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return _sums_below(weights, sums, target)


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
