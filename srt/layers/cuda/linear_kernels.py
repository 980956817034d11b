"""Matrix products with few rows in Triton: they read a weight once, as fast as memory gives it.

A program may begin while the kernel before it still runs (`PDL`, Hopper and newer): it fetches what it can of its
weight, which nobody writes, and then waits for that kernel to end before it touches x.
"""

from __future__ import annotations

import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over


@jit()
def vector_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, outputs: tl.tensor, K: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """out[n] = x . weight[n] for some n."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < outputs
    columns = tl.arange(0, STEP)
    own = weight + tl.where(live, row, 0).to(tl.int64)[:, None] * K + columns[None, :]
    first = tl.load(own, mask=(columns < K)[None, :], other=0.0)
    take_over(PDL)
    total = first.to(tl.float32) * tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
    for k in range(STEP, K, STEP):
        within = k + columns < K
        w = tl.load(own + k, mask=within[None, :], other=0.0).to(tl.float32)
        total += w * tl.load(x + k + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=live)


@jit(do_not_specialize=["count"])
def rows_kernel(
    x: tl.tensor, x_stride: tl.tensor, weight: tl.tensor, out: tl.tensor, count: tl.tensor, outputs: tl.tensor,
    K: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """out[m, n] = x[m] . weight[n] for all of few m and some n; K divides by STEP."""
    row, m, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COUNT), tl.arange(0, STEP)
    live, there = row < outputs, m < count
    own = weight + tl.where(live, row, 0).to(tl.int64)[None, :] * K + columns[:, None]
    given = x + m[:, None] * x_stride + columns[None, :]
    total = tl.zeros((COUNT, ROWS), tl.float32)
    take_over(PDL)
    for k in tl.range(0, K, STEP, num_stages=STAGES):
        total = tl.dot(tl.load(given + k, mask=there[:, None], other=0.0), tl.load(own + k), total)
    target = out + m[:, None].to(tl.int64) * outputs + row[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None] & live[None, :])
