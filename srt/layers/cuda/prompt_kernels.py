"""Paged attention of prompts in Triton: tiles of many tokens, of which most blocks of keys are seen whole.

A block of keys is at an edge of a tile where a token of the tile does not see all of it: at the diagonal, behind the
window, or where the row ends. Elsewhere nothing is masked, and a score costs one multiply-add and one power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def pages_of(
    table: tl.tensor, at: tl.tensor, end: tl.tensor, PAGE: tl.constexpr, KEYS: tl.constexpr, BY_PAGE: tl.constexpr
) -> tl.tensor:
    """Pages of the keys [at, at + KEYS): one, one each PAGE keys, or one for each key."""
    if PAGE % KEYS == 0:
        pages = tl.load(table + at // PAGE, mask=at < end, other=0)
    elif BY_PAGE and KEYS % PAGE == 0:
        numbers = at // PAGE + tl.arange(0, KEYS // PAGE)
        pages = tl.load(table + numbers, mask=numbers * PAGE < end, other=0)
    else:
        key = at + tl.arange(0, KEYS)
        pages = tl.load(table + key // PAGE, mask=key < end, other=0)
    return pages


@triton.jit  # type: ignore[untyped-decorator]
def places_of(
    pages: tl.tensor, at: tl.tensor, head: tl.tensor, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, BY_PAGE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where the keys [at, at + KEYS) of one head lie: [KEYS] int64, in elements. `at` is a multiple of KEYS."""
    within, first = tl.arange(0, KEYS), pages.to(tl.int64) * PAGE
    if PAGE % KEYS == 0:
        places = ((first + at % PAGE) * KV_HEADS + head) * SIZE + within * (KV_HEADS * SIZE)
    elif BY_PAGE and KEYS % PAGE == 0:
        slot = tl.reshape(first[:, None] + tl.arange(0, PAGE)[None, :], (KEYS,))
        places = (slot * KV_HEADS + head) * SIZE
    else:
        places = ((first + (at + within) % PAGE) * KV_HEADS + head) * SIZE
    return places


@triton.jit  # type: ignore[untyped-decorator]
def take_in(
    largest: tl.tensor, sums: tl.tensor, total: tl.tensor, score: tl.tensor, v: tl.tensor, factor: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take in the values of some more keys; `score` times `factor` is a power of two, minus infinity: not seen."""
    new = tl.maximum(largest, tl.max(score, axis=1))
    base = tl.where(new == -float("inf"), 0.0, new * factor)
    weight = tl.exp2(score * factor - base[:, None])
    shrink = tl.exp2(largest * factor - base)
    sums = sums * shrink + tl.sum(weight, axis=1)
    total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return new, sums, total


@triton.jit  # type: ignore[untyped-decorator]
def hide(
    score: tl.tensor, at: tl.tensor, lowest: tl.tensor, end: tl.tensor, position: tl.tensor, WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scores without those of keys that a token does not see."""
    key = at + tl.arange(0, KEYS)
    seen = ((key >= lowest) & (key < end))[None, :] & (key[None, :] <= position[:, None])
    if WINDOW > 0:
        seen = seen & (position[:, None] - key[None, :] < WINDOW)
    return tl.where(seen, score, -float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def some_keys(
    own: tl.tensor, keys: tl.tensor, values: tl.tensor, table: tl.tensor, head: tl.tensor, position: tl.tensor,
    factor: tl.tensor, lowest: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor, begin: tl.tensor,
    stop: tl.tensor, largest: tl.tensor, sums: tl.tensor, total: tl.tensor, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, BY_PAGE: tl.constexpr, AHEAD: tl.constexpr,
    EDGE: tl.constexpr, BRANCH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The blocks of keys from `begin` to before `stop`; those of [low, high) are seen whole.

    `EDGE`: some may not be; then `BRANCH` masks those alone, else all are masked.
    """
    columns = tl.arange(0, SIZE)
    after = pages_of(table, begin, end, PAGE, KEYS, BY_PAGE)
    for at in range(begin, stop, KEYS):
        if AHEAD:
            pages = after
            after = pages_of(table, at + KEYS, end, PAGE, KEYS, BY_PAGE)
        else:
            pages = pages_of(table, at, end, PAGE, KEYS, BY_PAGE)
        place = places_of(pages, at, head, KV_HEADS, SIZE, PAGE, KEYS, BY_PAGE)
        if EDGE:
            key = at + tl.arange(0, KEYS)
            there = (key >= lowest) & (key < end)
            k = tl.load(keys + place[None, :] + columns[:, None], mask=there[None, :], other=0.0)
            v = tl.load(values + place[:, None] + columns[None, :], mask=there[:, None], other=0.0)
        else:
            k = tl.load(keys + place[None, :] + columns[:, None])
            v = tl.load(values + place[:, None] + columns[None, :])
        score = tl.dot(own, k.to(own.dtype), input_precision="ieee")
        if EDGE:
            if BRANCH:
                if (at < low) | (at >= high):
                    score = hide(score, at, lowest, end, position, WINDOW, KEYS)
            else:
                score = hide(score, at, lowest, end, position, WINDOW, KEYS)
        largest, sums, total = take_in(largest, sums, total, score, v.to(own.dtype), factor)
    return largest, sums, total


@jit(do_not_specialize_on_alignment=["tile_row", "tile_first"])
def prompt_kernel(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, gates: tl.tensor, gate_stride: tl.tensor, out: tl.tensor,
    tile_row: tl.tensor, tile_first: tl.tensor, query_starts: tl.tensor, kv_lens: tl.tensor, table: tl.tensor,
    table_stride: tl.tensor, table_rows: tl.tensor, k_scale: tl.tensor, v_scale: tl.tensor, scale: tl.tensor,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    CODED: tl.constexpr, LINES: tl.constexpr, KEYS: tl.constexpr, BY_PAGE: tl.constexpr, AHEAD: tl.constexpr,
    MASKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A few tokens of one row and the query heads of one key head; `MASKS` as `attention.Tiling` says."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    TOKENS: tl.constexpr = LINES // GROUP
    head, tile = tl.program_id(0), tl.program_id(1)
    take_over(PDL)
    row, first = tl.load(tile_row + tile), tl.load(tile_first + tile)
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    length = tl.load(kv_lens + row)
    lines, columns = tl.arange(0, LINES), tl.arange(0, SIZE)
    token = first + lines // GROUP
    live = (token < count) & (lines < TOKENS * GROUP)
    position = length - count + token
    place = (start + token).to(tl.int64) * Q_HEADS + head * GROUP + lines % GROUP
    own = tl.load(q + place[:, None] * SIZE + columns[None, :], mask=live[:, None], other=0.0)
    top = length - count + first
    end = tl.minimum(length, top + TOKENS)
    lowest, low = end * 0, end * 0
    if WINDOW > 0:
        lowest = tl.maximum(0, top - WINDOW + 1)
        low = tl.cdiv(tl.maximum(0, end - WINDOW), KEYS) * KEYS
    high = tl.maximum(low, tl.maximum(0, top + 1) // KEYS * KEYS)
    begin = lowest // KEYS * KEYS
    table += tl.load(table_rows + row) * table_stride
    factor = scale * LOG2E * (tl.load(k_scale) if CODED else 1.0)
    largest = tl.full((LINES,), -float("inf"), tl.float32)
    sums = tl.zeros((LINES,), tl.float32)
    total = tl.zeros((LINES, SIZE), tl.float32)
    if MASKS == "split":
        if WINDOW > 0:
            largest, sums, total = some_keys(
                own, keys, values, table, head, position, factor, lowest, end, low, high, begin, tl.minimum(low, end),
                largest, sums, total, KV_HEADS, SIZE, WINDOW, PAGE, KEYS, BY_PAGE, AHEAD, True, False,
            )  # fmt: skip
        largest, sums, total = some_keys(
            own, keys, values, table, head, position, factor, lowest, end, low, high, low, high,
            largest, sums, total, KV_HEADS, SIZE, WINDOW, PAGE, KEYS, BY_PAGE, AHEAD, False, False,
        )  # fmt: skip
        largest, sums, total = some_keys(
            own, keys, values, table, head, position, factor, lowest, end, low, high, high, end,
            largest, sums, total, KV_HEADS, SIZE, WINDOW, PAGE, KEYS, BY_PAGE, AHEAD, True, False,
        )  # fmt: skip
    else:
        largest, sums, total = some_keys(
            own, keys, values, table, head, position, factor, lowest, end, low, high, begin, end,
            largest, sums, total, KV_HEADS, SIZE, WINDOW, PAGE, KEYS, BY_PAGE, AHEAD, True, MASKS == "branch",
        )  # fmt: skip
    if CODED:
        total *= tl.load(v_scale)
    gate = tl.load(gates + (start + token).to(tl.int64) * gate_stride + head * GROUP + lines % GROUP, mask=live)
    opened = 1.0 / (1.0 + tl.exp(-gate.to(tl.float32))) / tl.where(sums > 0, sums, 1.0)
    tl.store(
        out + place[:, None] * SIZE + columns[None, :], (total * opened[:, None]).to(out.dtype.element_ty),
        mask=live[:, None],
    )  # fmt: skip


@jit()
def gate_kernel(
    out: tl.tensor, gates: tl.tensor, gate_stride: tl.tensor, Q_HEADS: tl.constexpr, SIZE: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Some heads of one token, each times the sigmoid of its gate."""
    token = tl.program_id(0).to(tl.int64)
    heads, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, SIZE)
    there = heads < Q_HEADS
    take_over(PDL)
    gate = tl.load(gates + token * gate_stride + heads, mask=there, other=0.0).to(tl.float32)
    at = out + (token * Q_HEADS + heads)[:, None] * SIZE + columns[None, :]
    value = tl.load(at, mask=there[:, None], other=0.0)
    tl.store(at, (value.to(tl.float32) / (1.0 + tl.exp(-gate))[:, None]).to(value.dtype), mask=there[:, None])
