"""Before and after the experts' products, in Triton: sorting by expert, encoding, summing up."""

from __future__ import annotations

import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over

E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1.1754943508222875e-38)


@jit(do_not_specialize=["pairs", "blocks"])
def schedule_kernel(
    ids: tl.tensor, order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor,
    pairs: tl.tensor, blocks: tl.tensor, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One expert: put its pairs in order, list its blocks. The program after the last expert lists the idle blocks.

    Every program counts all ids for itself, so that none waits for another.
    """
    me = tl.program_id(0)
    experts, steps = tl.arange(0, PADDED), tl.arange(0, CHUNK)
    counts = tl.zeros((PADDED,), tl.int32)
    take_over(PDL)
    for start in range(0, pairs, CHUNK):
        expert = tl.load(ids + start + steps, mask=start + steps < pairs, other=EXPERTS)
        counts += tl.histogram(expert, PADDED)
    counts = tl.where(experts < EXPERTS, counts, 0)
    needed = (counts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(experts < me, counts, 0))
    block = tl.sum(tl.where(experts < me, needed, 0))
    tl.store(starts + me, first)
    mine = tl.sum(tl.where(experts == me, needed, 0))
    listed = tl.where(me < EXPERTS, mine, blocks - block)
    for start in range(0, listed, CHUNK):
        number = start + steps
        tl.store(block_expert + block + number, me, mask=number < listed)
        tl.store(block_row + block + number, first + number * ROWS, mask=number < listed)
    if me < EXPERTS:
        done = first
        for start in range(0, pairs, CHUNK):
            here = tl.load(ids + start + steps, mask=start + steps < pairs, other=EXPERTS) == me
            place = done + tl.cumsum(here.to(tl.int32), axis=0) - 1
            tl.store(order + place, start + steps, mask=here)
            done += tl.sum(here.to(tl.int32))


@jit(do_not_specialize=["pairs"])
def count_kernel(
    ids: tl.tensor, counts: tl.tensor, pairs: tl.tensor, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """counts[chunk, expert]: how often a chunk of ids names an expert."""
    chunk, experts, steps = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, CHUNK)
    here = chunk * CHUNK + steps
    take_over(PDL)
    count = tl.histogram(tl.load(ids + here, mask=here < pairs, other=EXPERTS), PADDED)
    tl.store(counts + chunk * PADDED + experts, tl.where(experts < EXPERTS, count, 0))


@jit(do_not_specialize=["pairs", "blocks", "chunks"])
def place_kernel(
    ids: tl.tensor, counts: tl.tensor, order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor,
    block_row: tl.tensor, pairs: tl.tensor, blocks: tl.tensor, chunks: tl.tensor, EXPERTS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, READ: tl.constexpr, PART: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One chunk of ids: put its pairs in order; list its share of the blocks. What `schedule_kernel` does, for many."""
    me, experts, steps = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, CHUNK)
    total = tl.zeros((PADDED,), tl.int32)
    before = tl.zeros((PADDED,), tl.int32)
    take_over(PDL)
    for start in range(0, chunks, READ):
        rows = start + tl.arange(0, READ)
        part = tl.load(counts + rows[:, None] * PADDED + experts[None, :], mask=(rows < chunks)[:, None], other=0)
        total += tl.sum(part, axis=0)
        before += tl.sum(tl.where((rows < me)[:, None], part, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total
    if me == 0:
        tl.store(starts + experts, first, mask=experts <= EXPERTS)
    needed = (total + ROWS - 1) // ROWS
    ends = tl.cumsum(needed, axis=0)
    share = (blocks + chunks - 1) // chunks
    for start in range(me * share, me * share + share, PART):
        number = start + tl.arange(0, PART)
        passed = (ends[None, :] <= number[:, None]) & (experts < EXPERTS)[None, :]
        expert = tl.sum(passed.to(tl.int32), axis=1)
        own = experts[None, :] == expert[:, None]
        row = tl.sum(tl.where(own, (first - (ends - needed) * ROWS)[None, :], 0), axis=1) + number * ROWS
        listed = (number < blocks) & (number < me * share + share)
        tl.store(block_expert + number, expert, mask=listed)
        tl.store(block_row + number, row, mask=listed)
    here = me * CHUNK + steps
    expert = tl.load(ids + here, mask=here < pairs, other=EXPERTS)
    rank = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, CHUNK, PART):
        others = start + tl.arange(0, PART)
        other = tl.load(ids + me * CHUNK + others, mask=me * CHUNK + others < pairs, other=EXPERTS)
        same = (other[:, None] == expert[None, :]) & (others[:, None] < steps[None, :])
        rank += tl.sum(same.to(tl.int32), axis=0)
    place = tl.gather(first + before, expert, 0) + rank
    tl.store(order + place, here, mask=expert < EXPERTS)


@jit()
def combine_kernel(
    pairs: tl.tensor, ids: tl.tensor, weights: tl.tensor, shared: tl.tensor, out: tl.tensor, EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out[token] = sum of weight * pair over the experts that are here, plus the shared expert; rounded once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in tl.static_range(TOP_K):
        slot = token * TOP_K + place
        here = tl.load(ids + slot) < EXPERTS
        pair = tl.load(pairs + slot * HIDDEN + columns, mask=inside & here, other=0.0).to(tl.float32)
        total += pair * tl.load(weights + slot)
    if SHARED:
        total += tl.load(shared + token * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + columns, total.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def encode_kernel(
    x: tl.tensor, x_stride: tl.tensor, codes: tl.tensor, scales: tl.tensor, rows: tl.tensor, K: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Activations to e4m3, one scale for a row's 128 columns: as `srt.layers.quant.fp8.encode_tokens`, bit for bit."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mine = row < rows
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    take_over(PDL)
    values = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=mine[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    scale = tl.where(largest > 0, tl.maximum(tl.div_rn(largest, E4M3_MAX), TINY), 1.0)
    ratio = tl.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, 128)))
    clamped = tl.minimum(tl.maximum(ratio, -E4M3_MAX), E4M3_MAX)
    tl.store(codes + row[:, None] * K + columns[None, :], clamped.to(codes.dtype.element_ty), mask=mine[:, None])
    tl.store(scales + row * (K // 128) + tl.program_id(1), scale, mask=mine)
