"""Norms, activation and arg max in Triton. All arithmetic is float32, rounded once."""

from __future__ import annotations

import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over


@jit()
def norm_kernel(
    x: tl.tensor, x_stride: tl.tensor, residual: tl.tensor, residual_stride: tl.tensor, weight: tl.tensor,
    total: tl.tensor, out: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row: out = s / rms(s) * (1 + weight) for s = x, or for s = x + residual, which goes to `total`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    take_over(PDL)
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * SIZE + columns, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    tl.store(out + row * SIZE + columns, (wide * scale * (1.0 + gain)).to(out.dtype.element_ty), mask=inside)


@jit()
def gated_silu_kernel(
    gate_up: tl.tensor, stride: tl.tensor, out: tl.tensor, limit: tl.tensor, WIDTH: tl.constexpr, CLAMP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """min(silu(gate), limit) * clamp(up, -limit, limit) for some columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    take_over(PDL)
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    activated = gate / (1.0 + tl.exp(-gate))
    if CLAMP:
        activated = tl.minimum(activated, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    tl.store(out + row * WIDTH + columns, (activated * up).to(out.dtype.element_ty), mask=inside)


@jit()
def block_max_kernel(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, places: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The largest logit of each block of a row, and the first place where it stands."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    take_over(PDL)
    own = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
    finite = tl.min(((own == own) & (tl.abs(own) < float("inf")) | ~inside).to(tl.int32), axis=0)
    own = tl.where(own == own, own, -float("inf"))
    best = tl.max(own, axis=0)
    at = row * tl.num_programs(1) + block
    tl.store(values + at, best)
    # A block with a logit that is not finite says so by a place that is none.
    place = tl.min(tl.where(inside & (own == best), columns, SIZE - 1), axis=0)
    tl.store(places + at, tl.where(finite == 1, place, -1 - place))


@jit()
def row_max_kernel(
    values: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    finite: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Where the largest of a row's blocks has its largest logit, the first one among equals; and whether all are
    finite."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK)
    inside = blocks < COUNT
    take_over(PDL)
    own = tl.load(values + row * COUNT + blocks, mask=inside, other=-float("inf"))
    told = tl.load(places + row * COUNT + blocks, mask=inside, other=2147483647)
    tl.store(finite + row, tl.min((told >= 0).to(tl.int32), axis=0))
    place = tl.where(told >= 0, told, -1 - told)
    best = tl.max(own, axis=0)
    tl.store(out + row, tl.min(tl.where(own == best, place, 2147483647), axis=0).to(tl.int64))
