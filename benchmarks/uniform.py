"""Routing for benchmarks: the router's work is done, and then experts are drawn evenly, whatever the weights say.

Made-up weights send most tokens to few experts, which makes a step cheaper than one of a trained model. And their
draft modules guess nothing right; which guesses count can be drawn too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over
from srt.layers.cuda.ops import TritonOps
from srt.layers.ops import Choice
from srt.worker.device.fused_rows import FusedRows
from srt.worker.device.rows import DeviceOutcome, DeviceStep


@jit()
def draw_kernel(
    x: tl.tensor,
    stride: tl.tensor,
    ids: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Distinct experts of one token, from the bits of its hidden state. EXPERTS has no prime factors but 2 and 3."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, 32)
    take_over(PDL)
    bits = tl.load(x + token * stride + places).to(tl.int16, bitcast=True).to(tl.uint32)
    mixed = tl.sum((bits + 1) * (places.to(tl.uint32) * 2 + 1) * 0x9E3779B1, axis=0)
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE3D
    mixed = mixed ^ (mixed >> 16)
    first, step = mixed % EXPERTS, ((mixed >> 12) % (EXPERTS // 6)) * 6 + 1
    chosen = tl.arange(0, PADDED_K)
    drawn = (first + chosen.to(tl.uint32) * step) % EXPERTS
    tl.store(ids + token * TOP_K + chosen, drawn.to(tl.int32), mask=chosen < TOP_K)


@jit()
def accept_kernel(
    rows: tl.tensor, known: tl.tensor, drafted: tl.tensor, firsts: tl.tensor, tokens: tl.tensor, stride: tl.tensor,
    sampled: tl.tensor, share: tl.tensor, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """Let one row have sampled its first guesses: i of them or more with a chance of share^i."""
    me = tl.program_id(0)
    row, there, checked = tl.load(rows + me), tl.load(known + me), tl.load(drafted + me)
    mixed = (there.to(tl.uint32) + 1) * 0x9E3779B1 ^ (row.to(tl.uint32) + 1) * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE3D
    mixed = (mixed ^ (mixed >> 13)) * 0x27D4EB2F
    number = ((mixed ^ (mixed >> 16)) >> 8).to(tl.float32) * (2.0**-24)
    chance = share
    for place in tl.static_range(DEPTH):
        guess = tl.load(tokens + row * stride + there + place)
        right = (number < chance) & (place < checked)
        tl.store(sampled + tl.load(firsts + me) + place, guess.to(tl.int64), mask=right)
        chance = chance * share


class AcceptingRows(FusedRows):
    """Rows whose steps keep `length` tokens on average, whatever the model samples."""

    def __init__(self, length: float, device: torch.device, *sizes: int) -> None:
        super().__init__(device, *sizes)
        self._share = share_for(length, sizes[-1])

    def end(self, step: DeviceStep, sampled: Tensor, finite: Tensor) -> DeviceOutcome:
        """As ever, with drawn guesses in the place of what was sampled."""
        layout = step.layout
        if layout.depth:
            accept_kernel[len(layout.emits),](
                step.emitting, step.known, step.drafted, layout.firsts, self.tokens, self.tokens.stride(0), sampled,
                self._share, DEPTH=layout.depth, num_warps=1,
            )  # fmt: skip
        return super().end(step, sampled, finite)


def share_for(length: float, drafts: int) -> float:
    """The chance of each guess, after right ones, with which a step keeps `length` tokens: 1 + a + a^2 + ..

    Raises: ValueError if so many guesses cannot come to it.
    """
    if not 1 <= length < 1 + drafts:
        raise ValueError(f"{drafts} guesses keep 1 to {1 + drafts} tokens a step, not {length}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**place for place in range(drafts + 1)) < length else (low, middle)
    return low


class UniformOps(TritonOps):
    """`TritonOps` for bfloat16, with experts drawn evenly: the same ones for the same hidden state."""

    def route(self, x: Tensor, packed: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        choice = super().route(x, packed, bias, top_k=top_k, factor=factor)
        assert x.dtype == torch.bfloat16
        if len(x):
            draw_kernel[len(x),](
                x, x.stride(0), choice.ids, EXPERTS=packed.shape[0], TOP_K=top_k,
                PADDED_K=triton.next_power_of_2(top_k), num_warps=1, **self._launch,
            )  # fmt: skip
        return choice
