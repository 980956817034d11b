"""Paged attention in Triton: prepare q, k and v; attend for a few tokens of a row; add up what was attended in parts.

A program of `attend_kernel` has a few tokens of one row and all query heads of one key head, so that each key is read
once for all of them: line m of its tile is token m // GROUP of its tokens and query head m % GROUP of the key head's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over
from srt.layers.cuda.prompt_kernels import pages_of, places_of

LOG2E = tl.constexpr(1.4426950408889634)
E4M3_MAX = tl.constexpr(448.0)


@jit(do_not_specialize_on_alignment=["positions", "slots"])
def store_kernel(
    qkv: tl.tensor, stride: tl.tensor, positions: tl.tensor, slots: tl.tensor, rope: tl.tensor, q_norm: tl.tensor,
    k_norm: tl.tensor, k_scale: tl.tensor, v_scale: tl.tensor, q: tl.tensor, keys: tl.tensor, values: tl.tensor,
    eps: tl.tensor, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, ROTARY: tl.constexpr,
    CODED: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Some heads of one token: q and k normalised and rotated, q to `q`, k and v to their slot."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, SIZE)
    is_q = heads < Q_HEADS
    is_k = (heads >= Q_HEADS) & (heads < Q_HEADS + KV_HEADS)
    is_v = (heads >= Q_HEADS + KV_HEADS) & (heads < Q_HEADS + 2 * KV_HEADS)
    there = (is_q | is_k | is_v)[:, None]
    source = qkv + token * stride + heads[:, None] * SIZE
    take_over(PDL)
    x = tl.load(source + columns[None, :], mask=there, other=0.0)
    wide = x.to(tl.float32)
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(columns < half, columns + half, tl.where(columns < ROTARY, columns - half, columns))
    other = tl.load(source + partner[None, :], mask=there, other=0.0).to(tl.float32)
    gain = tl.where(is_q[:, None], tl.load(q_norm + columns)[None, :], tl.load(k_norm + columns)[None, :])
    other_gain = tl.where(is_q[:, None], tl.load(q_norm + partner)[None, :], tl.load(k_norm + partner)[None, :])
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)[:, None]
    normed = (wide * scale * (1.0 + gain.to(tl.float32))).to(x.dtype).to(tl.float32)
    other = (other * scale * (1.0 + other_gain.to(tl.float32))).to(x.dtype).to(tl.float32)
    angles = rope + tl.load(positions + token) * ROTARY
    rotated = columns < ROTARY
    pair = tl.where(columns < half, columns, columns - half)
    cosine = tl.load(angles + pair, mask=rotated, other=1.0)[None, :]
    sine = tl.load(angles + half + pair, mask=rotated, other=0.0)[None, :]
    turned = normed * cosine + tl.where(columns < half, -1.0, 1.0)[None, :] * other * sine
    turned = tl.where(rotated[None, :], turned, normed)
    place = token * Q_HEADS + heads
    tl.store(q + place[:, None] * SIZE + columns[None, :], turned.to(q.dtype.element_ty), mask=is_q[:, None])
    slot = tl.load(slots + token) * KV_HEADS
    at_k = keys + (slot + heads - Q_HEADS)[:, None] * SIZE + columns[None, :]
    at_v = values + (slot + heads - Q_HEADS - KV_HEADS)[:, None] * SIZE + columns[None, :]
    if CODED:
        turned = turned.to(x.dtype).to(tl.float32) / tl.load(k_scale)
        wide = wide / tl.load(v_scale)
        turned = tl.minimum(tl.maximum(turned, -E4M3_MAX), E4M3_MAX)
        wide = tl.minimum(tl.maximum(wide, -E4M3_MAX), E4M3_MAX)
    tl.store(at_k, turned.to(keys.dtype.element_ty), mask=is_k[:, None])
    tl.store(at_v, wide.to(values.dtype.element_ty), mask=is_v[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def keys_of(
    position: tl.tensor, length: tl.tensor, part: tl.tensor, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The first key that `TOKENS` tokens from `position` on see, and the keys [begin, end) of one part of theirs."""
    end = tl.minimum(length, position + TOKENS)
    lowest = position * 0
    if WINDOW > 0:
        lowest = tl.maximum(0, position - WINDOW + 1)
    begin = lowest // KEYS * KEYS
    if PARTS > 1:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), KEYS), PARTS) * KEYS
        begin += part * share
        end = tl.minimum(end, begin + share)
    return lowest, begin, end


@triton.jit  # type: ignore[untyped-decorator]
def weigh(
    largest: tl.tensor, sums: tl.tensor, total: tl.tensor, score: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take in the values of some more keys; scores are powers of two, minus infinity for keys that are not seen."""
    new = tl.maximum(largest, tl.max(score, axis=1))
    base = tl.where(new == -float("inf"), 0.0, new)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(largest - base)
    sums = sums * shrink + tl.sum(weight, axis=1)
    total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return new, sums, total


@jit()
def attend_kernel(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, gates: tl.tensor, gate_stride: tl.tensor, out: tl.tensor,
    part_out: tl.tensor, part_sums: tl.tensor, query_starts: tl.tensor, kv_lens: tl.tensor, table: tl.tensor,
    table_stride: tl.tensor, table_rows: tl.tensor, k_scale: tl.tensor, v_scale: tl.tensor, scale: tl.tensor,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    CODED: tl.constexpr, PARTS: tl.constexpr, LINES: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The few tokens of one row, the query heads of one key head, one part of the keys that they see."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    TOKENS: tl.constexpr = LINES // GROUP
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    take_over(PDL)
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    length = tl.load(kv_lens + row)
    lines = tl.arange(0, LINES)
    token = lines // GROUP
    live = (token < count) & (lines < TOKENS * GROUP)
    position = length - count + token
    columns = tl.arange(0, SIZE)
    place = (start + token).to(tl.int64) * Q_HEADS + head * GROUP + lines % GROUP
    own = tl.load(q + place[:, None] * SIZE + columns[None, :], mask=live[:, None], other=0.0)
    lowest, begin, end = keys_of(length - count, length, part, TOKENS, WINDOW, PARTS, KEYS)
    table += tl.load(table_rows + row) * table_stride
    factor = scale * LOG2E * (tl.load(k_scale) if CODED else 1.0)
    largest = tl.full((LINES,), -float("inf"), tl.float32)
    sums = tl.zeros((LINES,), tl.float32)
    total = tl.zeros((LINES, SIZE), tl.float32)
    after = pages_of(table, begin, end, PAGE, KEYS, False)
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        there = (key >= lowest) & (key < end)
        if AHEAD:
            pages = after
            after = pages_of(table, at + KEYS, end, PAGE, KEYS, False)
        else:
            pages = pages_of(table, at, end, PAGE, KEYS, False)
        where = places_of(pages, at, head, KV_HEADS, SIZE, PAGE, KEYS, False)
        k = tl.load(keys + where[None, :] + columns[:, None], mask=there[None, :], other=0.0).to(own.dtype)
        score = tl.dot(own, k, input_precision="ieee") * factor
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (position[:, None] - key[None, :] < WINDOW)
        score = tl.where(seen, score, -float("inf"))
        v = tl.load(values + where[:, None] + columns[None, :], mask=there[:, None], other=0.0).to(own.dtype)
        largest, sums, total = weigh(largest, sums, total, score, v)
    if CODED:
        total *= tl.load(v_scale)
    if PARTS > 1:
        place = place * PARTS + part
        tl.store(part_out + place[:, None] * SIZE + columns[None, :], total, mask=live[:, None])
        tl.store(part_sums + place * 2, largest, mask=live)
        tl.store(part_sums + place * 2 + 1, sums, mask=live)
    else:
        gate = tl.load(gates + (start + token).to(tl.int64) * gate_stride + head * GROUP + lines % GROUP, mask=live)
        opened = 1.0 / (1.0 + tl.exp(-gate.to(tl.float32))) / tl.where(sums > 0, sums, 1.0)
        tl.store(
            out + place[:, None] * SIZE + columns[None, :], (total * opened[:, None]).to(out.dtype.element_ty),
            mask=live[:, None],
        )  # fmt: skip


@jit()
def combine_kernel(
    part_out: tl.tensor, part_sums: tl.tensor, gates: tl.tensor, gate_stride: tl.tensor, out: tl.tensor,
    Q_HEADS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One head of one token: its parts weighed by their sums, times the sigmoid of its gate."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts, columns = tl.arange(0, PARTS), tl.arange(0, SIZE)
    place = (token * Q_HEADS + head) * PARTS + parts
    take_over(PDL)
    largest, sums = tl.load(part_sums + place * 2), tl.load(part_sums + place * 2 + 1)
    most = tl.max(largest, axis=0)
    weight = tl.exp2(largest - tl.where(most == -float("inf"), 0.0, most))
    whole = tl.sum(weight * sums, axis=0)
    values = tl.load(part_out + place[:, None] * SIZE + columns[None, :])
    total = tl.sum(values * weight[:, None], axis=0)
    gate = tl.load(gates + token * gate_stride + head).to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp(-gate)) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + (token * Q_HEADS + head) * SIZE + columns, (total * opened).to(out.dtype.element_ty))
