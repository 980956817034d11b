"""Routing for benchmarks: the router's work is done, and then experts are drawn evenly, whatever the weights say.

Made-up weights send most tokens to few experts, which makes a step cheaper than one of a trained model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srt.layers.cuda.jit import jit
from srt.layers.cuda.ops import TritonOps
from srt.layers.ops import Choice


@jit()
def draw_kernel(
    x: tl.tensor, stride: tl.tensor, ids: tl.tensor, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED_K: tl.constexpr
) -> None:
    """Distinct experts of one token, from the bits of its hidden state. EXPERTS has no prime factors but 2 and 3."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, 32)
    bits = tl.load(x + token * stride + places).to(tl.int16, bitcast=True).to(tl.uint32)
    mixed = tl.sum((bits + 1) * (places.to(tl.uint32) * 2 + 1) * 0x9E3779B1, axis=0)
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE3D
    mixed = mixed ^ (mixed >> 16)
    first, step = mixed % EXPERTS, ((mixed >> 12) % (EXPERTS // 6)) * 6 + 1
    chosen = tl.arange(0, PADDED_K)
    drawn = (first + chosen.to(tl.uint32) * step) % EXPERTS
    tl.store(ids + token * TOP_K + chosen, drawn.to(tl.int32), mask=chosen < TOP_K)


class UniformOps(TritonOps):
    """`TritonOps` for bfloat16, with experts drawn evenly: the same ones for the same hidden state."""

    def route(self, x: Tensor, packed: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        choice = super().route(x, packed, bias, top_k=top_k, factor=factor)
        assert x.dtype == torch.bfloat16
        if len(x):
            draw_kernel[len(x),](
                x, x.stride(0), choice.ids, EXPERTS=packed.shape[0], TOP_K=top_k,
                PADDED_K=triton.next_power_of_2(top_k), num_warps=1,
            )  # fmt: skip
        return choice
