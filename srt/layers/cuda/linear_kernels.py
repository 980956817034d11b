"""Matrix products with few rows in Triton: they read a weight once, as fast as memory gives it.

A program may begin while the kernel before it still runs (`PDL`, Hopper and newer): it fetches what it can of its
weight, which nobody writes, and then waits for that kernel to end before it touches x.
"""

from __future__ import annotations

import triton.language as tl

from srt.layers.cuda.arrivals import last_to_arrive
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
    x: tl.tensor, x_stride: tl.tensor, weight: tl.tensor, out: tl.tensor, parts: tl.tensor, counters: tl.tensor,
    count: tl.tensor, outputs: tl.tensor, K: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """out[m, n] = x[m] . weight[n] for all of few m and some n, over one share of K; each share divides by STEP.

    The weight is the operand of which the matrix units take 64 rows, so x needs no more columns than it has.
    With several shares the last program to be done with these n adds up what all left in `parts`, in their order.
    """
    row, m, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COUNT), tl.arange(0, STEP)
    live, there = row < outputs, m < count
    begin = tl.program_id(1) * (K // SHARES)
    own = weight + tl.where(live, row, 0).to(tl.int64)[:, None] * K + begin + columns[None, :]
    given = x + m[:, None] * x_stride + begin + columns[None, :]
    total = tl.zeros((ROWS, COUNT), tl.float32)
    take_over(PDL)
    for k in tl.range(0, K // SHARES, STEP, num_stages=STAGES):
        total = tl.dot(tl.load(own + k), tl.load(given + k, mask=there[:, None], other=0.0).T, total)
    wanted = live[:, None] & there[None, :]
    places = m[None, :].to(tl.int64) * outputs + row[:, None]
    if SHARES == 1:
        tl.store(out + places, total.to(out.dtype.element_ty), mask=wanted)
    else:
        tl.store(parts + tl.program_id(1).to(tl.int64) * count * outputs + places, total, mask=wanted)
        last = last_to_arrive(counters + tl.program_id(0), SHARES)
        if last:
            total = tl.zeros((ROWS, COUNT), tl.float32)
            for share in tl.static_range(SHARES):
                part = parts + share * count * outputs + places
                total += tl.load(part, mask=wanted, other=0.0, cache_modifier=".cg")
            tl.store(out + places, total.to(out.dtype.element_ty), mask=wanted)
