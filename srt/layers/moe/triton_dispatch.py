"""Before and after the experts' products, in Triton: choosing, sorting by expert, encoding, summing up."""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit  # type: ignore[untyped-decorator]
def choose_kernel(
    logits: tl.tensor, bias: tl.tensor, ids: tl.tensor, weights: tl.tensor, factor: tl.tensor,
    stride: tl.tensor, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED: tl.constexpr, PLACES: tl.constexpr,
) -> None:  # fmt: skip
    """One token: the TOP_K largest sigmoid(logit) + bias, the lowest id first among equals."""
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, PADDED), tl.arange(0, PLACES)
    known = experts < EXPERTS
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * stride + experts, mask=known, other=0.0)))
    biased = tl.where(known, score + tl.load(bias + experts, mask=known, other=0.0), float("-inf"))
    chosen_ids = tl.zeros((PLACES,), tl.int32)
    chosen = tl.zeros((PLACES,), tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.argmax(biased, axis=0, tie_break_left=True)
        chosen_ids = tl.where(places == place, best, chosen_ids)
        chosen = tl.where(places == place, tl.sum(tl.where(experts == best, score, 0.0)), chosen)
        biased = tl.where(experts == best, float("-inf"), biased)
    # The tiny term only matters when every chosen sigmoid has underflowed to zero.
    scaled = chosen * (factor / (tl.sum(chosen) + 1e-20))
    tl.store(ids + token * TOP_K + places, chosen_ids, mask=places < TOP_K)
    tl.store(weights + token * TOP_K + places, scaled, mask=places < TOP_K)


@triton.jit(do_not_specialize=["pairs", "blocks"])  # type: ignore[untyped-decorator]
def schedule_kernel(
    ids: tl.tensor, order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor,
    pairs: tl.tensor, blocks: tl.tensor, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One expert: put its pairs in order, list its blocks. The program after the last expert lists the idle blocks.

    Every program counts all ids for itself, so that none waits for another.
    """
    me = tl.program_id(0)
    experts, steps = tl.arange(0, PADDED), tl.arange(0, CHUNK)
    counts = tl.zeros((PADDED,), tl.int32)
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


@triton.jit  # type: ignore[untyped-decorator]
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


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def encode_kernel(
    x: tl.tensor, x_stride: tl.tensor, codes: tl.tensor, scales: tl.tensor, rows: tl.tensor, K: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Activations to e4m3, one scale for a row's 128 columns: as `srt.layers.quant.fp8.encode_tokens`, bit for bit."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mine = row < rows
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    values = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=mine[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    scale = tl.where(largest > 0, tl.maximum(tl.div_rn(largest, E4M3_MAX), TINY), 1.0)
    ratio = tl.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, 128)))
    clamped = tl.minimum(tl.maximum(ratio, -E4M3_MAX), E4M3_MAX)
    tl.store(codes + row[:, None] * K + columns[None, :], clamped.to(codes.dtype.element_ty), mask=mine[:, None])
    tl.store(scales + row * (K // 128) + tl.program_id(1), scale, mask=mine)
