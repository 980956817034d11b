"""Drawing tokens without sorting, a row's logits shared out among many programs.

What top_k and top_p cut off is found by distance: how far a logit lies below the largest of its row, in units of the
temperature. It is 0 or more, and its bits as an integer are in the same order. The cut is a distance, and how many of
the tokens at that very distance are kept, the lowest ids first.

    narrow, three times   counts or masses up to eight distances, between two of which the cut lies; if few logits lie
                          there after the first time, the others have nothing to do
    gather                the distances between these two, block by block
    cut                   one program a row: the cut among them
    sum                   the mass that each block keeps
    pick                  one program a row: the block, then the token, that the row's number falls on

Mass is a weight exp(-distance) in whole units of 2^-44. Sums of integers do not depend on their order, so all
these kernels agree on them, and a token does not depend on the rows beside it. Beyond `FAR` there is no mass.

An *item* is one of a step's wanted logits; a *line*, one of a table with the settings of rows.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over

FAR = tl.constexpr(32.0)
NOWHERE = tl.constexpr(64.0)
"""A cut that cuts nothing off."""
UNIT = tl.constexpr(17592186044416.0)
LEVELS = tl.constexpr(8)
"""Distances that one kernel tries."""
ROUNDS = tl.constexpr(3)
ONE = tl.constexpr(1)
SETTINGS = tl.constexpr(5)
"""Words of a line: top_k, seed; as float64 temperature, top_p, min_p."""
GREEDY_BELOW = tl.constexpr(1e-6)
NONE = tl.constexpr(2147483647)
NUMBERS: Final = ["items"]
COLUMNS: Final = ["rows", "emits", "wanted_rows", "wanted_offsets", "known"]
"""What differs from plan to plan in value or alignment; nothing is compiled anew for it."""


@triton.jit  # type: ignore[untyped-decorator]
def _line(item: tl.tensor, rows: tl.tensor, emits: tl.tensor, wanted_rows: tl.tensor) -> tl.tensor:
    """Where an item's row has its settings."""
    return tl.load(rows + tl.load(emits + tl.load(wanted_rows + item))) * SETTINGS


@triton.jit  # type: ignore[untyped-decorator]
def _counted(words: tl.tensor, line: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """top_k, or 0 if it keeps all."""
    top_k = tl.load(words + line)
    return tl.where(top_k < SIZE, top_k, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _distances(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, item: tl.tensor, first: tl.tensor, temperature: tl.tensor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of the logits from `first` on; infinite behind the last. `values` [items, COUNT]: the largest of each block."""
    columns = first + tl.arange(0, BLOCK)
    own = tl.load(logits + item * stride + columns, mask=columns < SIZE, other=-float("inf")).to(tl.float32)
    blocks = tl.arange(0, PADDED)
    largest = tl.max(tl.load(values + item * COUNT + blocks, mask=blocks < COUNT, other=-float("inf")), axis=0)
    # Of the two zeros the negative one would be far away in bits.
    return tl.abs(tl.div_rn(largest - own, tl.zeros_like(own) + temperature))


@triton.jit  # type: ignore[untyped-decorator]
def _masses(distance: tl.tensor, least: tl.tensor) -> tl.tensor:
    """int64; none for weights under `least`."""
    weight = tl.exp(-distance)
    return tl.where((distance < FAR) & (weight >= least), weight * UNIT + 0.5, 0.0).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _least(reals: tl.tensor, line: tl.tensor) -> tl.tensor:
    """min_p as float32, rounded up: a float32 weight is under the one if it is under the other."""
    min_p = tl.load(reals + line + 4)
    near = min_p.to(tl.float32)
    above = (near.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where(near.to(tl.float64) < min_p, above, near)


@triton.jit  # type: ignore[untyped-decorator]
def _share(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """The mass that top_p wants to be kept of `total`, at least one unit."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit  # type: ignore[untyped-decorator]
def _band(
    item: tl.tensor, items: tl.tensor, edges: tl.tensor, held: tl.tensor, numbers: tl.tensor, bands: tl.tensor,
    marks: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, COUNT: tl.constexpr, PADDED: tl.constexpr, ROOM: tl.constexpr,
    ROUND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Where the cut lies after `ROUND` rounds, (low, high]: these, what lies up to low, what shall lie up to the cut,
    and whether there is room for what lies between. Amounts are counts if there is a top_k, else masses.

    It follows from the round before, which is written down here for that purpose: [ROUNDS, items, ...].
    """
    low, high = tl.full((), -1.0, tl.float32), tl.full((), FAR, tl.float32)
    before, wanted, few = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if ROUND > 0:
        at = (ROUND - 1) * items + item
        if ROUND > 1:
            low, high = tl.load(bands + at * 2), tl.load(bands + at * 2 + 1)
            before, wanted, few = tl.load(marks + at * 3), tl.load(marks + at * 3 + 1), tl.load(marks + at * 3 + 2)
        if few == 0:
            levels, blocks = tl.arange(0, LEVELS), tl.arange(0, PADDED)
            place = blocks[:, None] * LEVELS + levels[None, :]
            inside = blocks[:, None] < COUNT
            reached = before + tl.sum(tl.load(held + at * COUNT * LEVELS + place, mask=inside, other=0), axis=0)
            edge = tl.load(edges + at * LEVELS + levels)
            if ROUND == 1:
                total = tl.max(reached, axis=0)
                wanted = tl.where(top_k > 0, tl.minimum(top_k, total), _share(total, top_p))
            level = tl.minimum(tl.sum((reached < wanted).to(tl.int32), axis=0), LEVELS - 1)
            if ROUND == 1:
                number = tl.load(numbers + item * COUNT * LEVELS + place, mask=inside, other=0)
                # With both filters all that lies up to high is gathered.
                sign = tl.where((top_k > 0) & (top_p < 1.0), 0, -1)
                signs = tl.where(levels == level, 1, tl.where(levels == level - 1, sign, 0))
                most = tl.max(tl.sum(number * signs[None, :], axis=1), axis=0)
                few = (most <= ROOM).to(tl.int64)
            high = tl.max(tl.where(levels == level, edge, -1.0), axis=0)
            # Before the first level lies what lay before.
            low = tl.maximum(low, tl.max(tl.where(levels == level - 1, edge, -1.0), axis=0))
            before = tl.maximum(before, tl.max(tl.where(levels == level - 1, reached, 0), axis=0))
    return low, high, before, wanted, few


@triton.jit  # type: ignore[untyped-decorator]
def _write_band(
    at: tl.tensor, low: tl.tensor, high: tl.tensor, before: tl.tensor, wanted: tl.tensor, few: tl.tensor,
    bands: tl.tensor, marks: tl.tensor,
) -> None:  # fmt: skip
    """For the kernels to come."""
    tl.store(bands + at * 2, low)
    tl.store(bands + at * 2 + 1, high)
    tl.store(marks + at * 3, before)
    tl.store(marks + at * 3 + 1, wanted)
    tl.store(marks + at * 3 + 2, few)


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=COLUMNS)
def narrow_kernel(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, rows: tl.tensor, emits: tl.tensor, wanted_rows: tl.tensor,
    words: tl.tensor, reals: tl.tensor, edges: tl.tensor, held: tl.tensor, numbers: tl.tensor, bands: tl.tensor,
    marks: tl.tensor, counts: tl.tensor, items: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    PADDED: tl.constexpr, ROOM: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """What a block of a row has up to each of eight distances in the band of the rounds before, to `held`; at first the
    numbers of logits as well, to `numbers`."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    take_over(PDL)
    line = _line(item, rows, emits, wanted_rows)
    temperature, top_p = tl.load(reals + line + 2), tl.load(reals + line + 3)
    top_k = _counted(words, line, SIZE)
    if (temperature >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0)):
        low, high, before, wanted, few = _band(
            item, items, edges, held, numbers, bands, marks, top_k, top_p, COUNT, PADDED, ROOM, ROUND
        )
        at = ROUND * items + item
        if block == 0:
            _write_band(at, low, high, before, wanted, few, bands, marks)
        if few == 0:
            distance = _distances(
                logits, stride, values, item, block * BLOCK, temperature.to(tl.float32), SIZE, BLOCK, COUNT, PADDED
            )
            live = (distance > low) & (distance <= high)
            some = tl.max(live.to(tl.int32), axis=0) > 0
            amounts = live.to(tl.int64)
            if some & (top_k == 0):
                amounts = tl.where(live, _masses(distance, 0.0), 0)
            for level in tl.static_range(LEVELS):
                edge = _edge(low, high, level, ROUND)
                tl.store(edges + at * LEVELS + level, edge, mask=block == 0)
                amount = tl.full((), 0, tl.int64)
                if some:
                    amount = tl.sum(tl.where(distance <= edge, amounts, 0), axis=0)
                tl.store(held + (at * COUNT + block) * LEVELS + level, amount)
                if ROUND == 0:
                    number = amount.to(tl.int32)
                    if top_k == 0:
                        number = tl.sum((distance <= edge).to(tl.int32), axis=0)
                    tl.store(numbers + (item * COUNT + block) * LEVELS + level, number)
        if ROUND == 0:
            tl.store(counts + item * COUNT + block, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _edge(low: tl.tensor, high: tl.tensor, LEVEL: tl.constexpr, ROUND: tl.constexpr) -> tl.tensor:
    """At first, powers of two up to `FAR`, since nothing is known of the scale; then evenly between low and high."""
    if ROUND == 0:
        edge = high / (ONE << (LEVELS - 1 - LEVEL))
    elif LEVEL == LEVELS - 1:
        edge = high
    else:
        floor = tl.maximum(low, 0.0)
        edge = tl.minimum(floor + (high - floor) * ((LEVEL + 1) / LEVELS), high)
    return edge


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=COLUMNS)
def gather_kernel(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, rows: tl.tensor, emits: tl.tensor, wanted_rows: tl.tensor,
    words: tl.tensor, reals: tl.tensor, edges: tl.tensor, held: tl.tensor, numbers: tl.tensor, bands: tl.tensor,
    marks: tl.tensor, counts: tl.tensor, items: tl.tensor, kept: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, PADDED: tl.constexpr, ROOM: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Distances of a block that may be the cut, to `kept` [items, COUNT, ROOM], in no order, and how many there are.

    With both top_k and top_p the cut may be at any distance up to the band's end.
    """
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    take_over(PDL)
    line = _line(item, rows, emits, wanted_rows)
    temperature, top_p = tl.load(reals + line + 2), tl.load(reals + line + 3)
    top_k = _counted(words, line, SIZE)
    if (temperature >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0)):
        low, high, before, wanted, few = _band(
            item, items, edges, held, numbers, bands, marks, top_k, top_p, COUNT, PADDED, ROOM, ROUNDS
        )
        if block == 0:
            _write_band(ROUNDS * items + item, low, high, before, wanted, few, bands, marks)
        distance = _distances(
            logits, stride, values, item, block * BLOCK, temperature.to(tl.float32), SIZE, BLOCK, COUNT, PADDED
        )
        floor = tl.where((top_k > 0) & (top_p < 1.0), -1.0, low)
        live = (distance > floor) & (distance <= high)
        at = item * COUNT + block
        place = tl.atomic_add(counts + at + tl.zeros_like(distance).to(tl.int32), 1, mask=live, sem="relaxed")
        tl.store(kept + at * ROOM + place, distance, mask=live & (place < ROOM))


@triton.jit  # type: ignore[untyped-decorator]
def _look(
    distance: tl.tensor, low: tl.tensor, high: tl.tensor, at: tl.tensor, BY_COUNT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of distances in (low, high]: what lies up to `at` (bits), the largest of these, and the smallest beyond."""
    bits = distance.to(tl.int32, bitcast=True)
    live = (distance > low) & (distance <= high)
    near = live & (bits <= at)
    if BY_COUNT:
        amount = tl.sum(near.to(tl.int64), axis=0)
    else:
        amount = tl.sum(tl.where(near, _masses(distance, 0.0), 0), axis=0)
    last = tl.max(tl.where(near, bits, -1), axis=0)
    following = tl.min(tl.where(live & (bits > at), bits, NONE), axis=0)
    return amount, last, following


@triton.jit  # type: ignore[untyped-decorator]
def _look_everywhere(
    distance: tl.tensor, logits: tl.tensor, stride: tl.tensor, values: tl.tensor, item: tl.tensor, end: tl.tensor,
    temperature: tl.tensor, low: tl.tensor, high: tl.tensor, at: tl.tensor, BY_COUNT: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """`_look` at what is at hand, and at the logits from there to `end`."""
    amount, last, following = _look(distance, low, high, at, BY_COUNT)
    for first in range(TILE, end, TILE):
        more = _distances(logits, stride, values, item, first, temperature, SIZE, TILE, COUNT, PADDED)
        amount_, last_, following_ = _look(more, low, high, at, BY_COUNT)
        amount += amount_
        last = tl.maximum(last, last_)
        following = tl.minimum(following, following_)
    return amount, last, following


@triton.jit  # type: ignore[untyped-decorator]
def _search(
    distance: tl.tensor, logits: tl.tensor, stride: tl.tensor, values: tl.tensor, item: tl.tensor, end: tl.tensor,
    temperature: tl.tensor, low: tl.tensor, high: tl.tensor, before: tl.tensor, wanted: tl.tensor,
    BY_COUNT: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The smallest distance in (low, high] up to which `wanted` lies, of which `before` up to low; and what lies below
    it. Halves the integers between the smallest and the largest distance that it may be."""
    _amount, _last, first = _look_everywhere(
        distance, logits, stride, values, item, end, temperature, low, high, tl.full((), -1, tl.int32), BY_COUNT, SIZE,
        TILE, COUNT, PADDED,
    )  # fmt: skip
    last = high.to(tl.int32, bitcast=True)
    while first < last:
        middle = first + (last - first) // 2
        amount, nearest, following = _look_everywhere(
            distance, logits, stride, values, item, end, temperature, low, high, middle, BY_COUNT, SIZE, TILE, COUNT,
            PADDED,
        )  # fmt: skip
        enough = before + amount >= wanted
        last = tl.where(enough, nearest, last)
        first = tl.where(enough, first, following)
    amount, _nearest, _following = _look_everywhere(
        distance, logits, stride, values, item, end, temperature, low, high, last - 1, BY_COUNT, SIZE, TILE, COUNT,
        PADDED,
    )  # fmt: skip
    return last.to(tl.float32, bitcast=True), before + amount


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=COLUMNS)
def cut_kernel(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, rows: tl.tensor, emits: tl.tensor, wanted_rows: tl.tensor,
    words: tl.tensor, reals: tl.tensor, bands: tl.tensor, marks: tl.tensor, items: tl.tensor, kept: tl.tensor,
    counts: tl.tensor, cuts: tl.tensor, ties: tl.tensor, SIZE: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
    ROOM: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The distance at which a row is cut, and how many tokens at that distance are kept.

    If a block had no room for all that may be the cut, the row's logits are read again and again.
    """
    item = tl.program_id(0).to(tl.int64)
    take_over(PDL)
    TILE: tl.constexpr = PADDED * ROOM
    line = _line(item, rows, emits, wanted_rows)
    warm, top_p = tl.load(reals + line + 2), tl.load(reals + line + 3)
    top_k = _counted(words, line, SIZE)
    temperature = warm.to(tl.float32)
    cut, own = tl.full((), NOWHERE, tl.float32), tl.full((), 0, tl.int64)
    if (warm >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0)):
        at = ROUNDS * items + item
        low, high = tl.load(bands + at * 2), tl.load(bands + at * 2 + 1)
        before, wanted = tl.load(marks + at * 3), tl.load(marks + at * 3 + 1)
        places, blocks = tl.arange(0, TILE), tl.arange(0, PADDED)
        most = tl.max(tl.load(counts + item * COUNT + blocks, mask=blocks < COUNT, other=0), axis=0)
        end = tl.where(most <= ROOM, 0, SIZE)
        if most <= ROOM:
            block = places // ROOM
            number = tl.load(counts + item * COUNT + block, mask=block < COUNT, other=0)
            distance = tl.load(kept + item * COUNT * ROOM + places, mask=places % ROOM < number, other=float("inf"))
        else:
            distance = _distances(logits, stride, values, item, 0, temperature, SIZE, TILE, COUNT, PADDED)
        if top_k > 0:
            cut, below = _search(
                distance, logits, stride, values, item, end, temperature, low, high, before, wanted, True, SIZE, TILE,
                COUNT, PADDED,
            )  # fmt: skip
            own = wanted - below
            if top_p < 1.0:
                # What top_k kept is the whole that top_p takes its share of.
                lowest = tl.full((), -1.0, tl.float32)
                inner, _last, _following = _look_everywhere(
                    distance, logits, stride, values, item, end, temperature, lowest, cut,
                    cut.to(tl.int32, bitcast=True) - 1, False, SIZE, TILE, COUNT, PADDED,
                )  # fmt: skip
                share = _share(inner + own * _masses(cut, 0.0), top_p)
                cut, below = _search(
                    distance, logits, stride, values, item, end, temperature, lowest, cut, tl.full((), 0, tl.int64),
                    share, False, SIZE, TILE, COUNT, PADDED,
                )  # fmt: skip
                own = tl.cdiv(share - below, tl.maximum(_masses(cut, 0.0), 1))
        else:
            cut, below = _search(
                distance, logits, stride, values, item, end, temperature, low, high, before, wanted, False, SIZE, TILE,
                COUNT, PADDED,
            )  # fmt: skip
            own = tl.cdiv(wanted - below, tl.maximum(_masses(cut, 0.0), 1))
    tl.store(cuts + item, cut)
    tl.store(ties + item, own)


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=COLUMNS)
def sum_kernel(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, rows: tl.tensor, emits: tl.tensor, wanted_rows: tl.tensor,
    reals: tl.tensor, cuts: tl.tensor, sums: tl.tensor, equals: tl.tensor, FILTERED: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The mass of a block nearer than the cut, and how many tokens are at the cut."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    take_over(PDL)
    line = _line(item, rows, emits, wanted_rows)
    temperature = tl.load(reals + line + 2)
    if temperature >= GREEDY_BELOW:
        distance = _distances(
            logits, stride, values, item, block * BLOCK, temperature.to(tl.float32), SIZE, BLOCK, COUNT, PADDED
        )
        masses = _masses(distance, _least(reals, line))
        if FILTERED:
            cut = tl.load(cuts + item)
            tl.store(equals + item * COUNT + block, tl.sum((distance == cut).to(tl.int64), axis=0))
            masses = tl.where(distance < cut, masses, 0)
        tl.store(sums + item * COUNT + block, tl.sum(masses, axis=0))


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=COLUMNS)
def pick_kernel(
    logits: tl.tensor, stride: tl.tensor, values: tl.tensor, places: tl.tensor, rows: tl.tensor, emits: tl.tensor,
    wanted_rows: tl.tensor, wanted_offsets: tl.tensor, known: tl.tensor, words: tl.tensor, reals: tl.tensor,
    cuts: tl.tensor, ties: tl.tensor, sums: tl.tensor, equals: tl.tensor, out: tl.tensor, finite: tl.tensor,
    FILTERED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The token of an item, and whether all its logits are finite."""
    item = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, PADDED)
    inside = blocks < COUNT
    take_over(PDL)
    line = _line(item, rows, emits, wanted_rows)
    temperature = tl.load(reals + line + 2)
    told = tl.load(places + item * COUNT + blocks, mask=inside, other=NONE)
    tl.store(finite + item, tl.min((told >= 0).to(tl.int32), axis=0))
    if temperature < GREEDY_BELOW:
        own = tl.load(values + item * COUNT + blocks, mask=inside, other=-float("inf"))
        place = tl.where(told >= 0, told, -1 - told)
        tl.store(out + item, tl.min(tl.where(own == tl.max(own, axis=0), place, NONE), axis=0).to(tl.int64))
    else:
        least = _least(reals, line)
        found = tl.load(sums + item * COUNT + blocks, mask=inside, other=0)
        if FILTERED:
            cut, left = tl.load(cuts + item), tl.load(ties + item)
            equal = tl.load(equals + item * COUNT + blocks, mask=inside, other=0)
            earlier = tl.cumsum(equal, axis=0) - equal
            taken = tl.minimum(tl.maximum(left - earlier, 0), equal)
            found += taken * _masses(cut, least)
        ends = tl.cumsum(found, axis=0)
        total = tl.max(ends, axis=0)
        owner = tl.load(wanted_rows + item)
        position = tl.load(known + owner) + tl.load(wanted_offsets + item)
        number = _uniform(tl.load(words + line + 1), position)
        target = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
        block = tl.minimum(tl.sum((ends <= target).to(tl.int32), axis=0), COUNT - 1)
        rest = target - tl.max(tl.where(blocks < block, ends, 0), axis=0)
        distance = _distances(
            logits, stride, values, item, block * BLOCK, temperature.to(tl.float32), SIZE, BLOCK, COUNT, PADDED
        )
        masses = _masses(distance, least)
        if FILTERED:
            at = distance == cut
            mine = tl.sum(tl.where(blocks == block, taken, 0), axis=0)
            masses = tl.where((distance < cut) | (at & (tl.cumsum(at.to(tl.int32), axis=0) <= mine)), masses, 0)
        within = tl.sum((tl.cumsum(masses, axis=0) <= rest).to(tl.int32), axis=0)
        tl.store(out + item, tl.minimum(block * BLOCK + within, SIZE - 1).to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _scramble(x: tl.tensor) -> tl.tensor:
    """The finaliser of splitmix64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit  # type: ignore[untyped-decorator]
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The number in [0, 1) of a seed and a position: `srt.worker.sampler.uniform`."""
    bits = _scramble(_scramble(seed.to(tl.uint64, bitcast=True)) ^ position.to(tl.uint64, bitcast=True))
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16
