"""Reading and writing rows in one kernel each, for steps small enough for one program.

The plain versions in `srt/worker/device/rows.py` say what these compute; as a few dozen kernels of torch they would
take as long as a layer.
"""

from __future__ import annotations

import triton.language as tl

from srt.layers.cuda.jit import jit


@jit(
    do_not_specialize=["R", "E", "T"],
    do_not_specialize_on_alignment=[
        "rows", "counts", "widths", "drafts", "emits", "token_rows", "offsets", "starts", "known", "drafted", "fault",
        "ids", "positions", "slots",
    ],
)  # fmt: skip
def begin_kernel(
    rows: tl.tensor, counts: tl.tensor, widths: tl.tensor, drafts: tl.tensor, emits: tl.tensor, token_rows: tl.tensor,
    offsets: tl.tensor, state: tl.tensor, tokens: tl.tensor, tokens_stride: tl.tensor, tables: tl.tensor,
    group_stride: tl.tensor, line_stride: tl.tensor, last: tl.tensor, starts: tl.tensor, kv_lens: tl.tensor,
    known: tl.tensor, drafted: tl.tensor, fault: tl.tensor, ids: tl.tensor, positions: tl.tensor, slots: tl.tensor,
    R: tl.tensor, E: tl.tensor, T: tl.tensor, GROUPS: tl.constexpr, PAGE: tl.constexpr,
    MOST: tl.constexpr,
) -> None:  # fmt: skip
    """What a layout means now: starts, lengths, guesses to check; ids, positions and slots of all tokens."""
    r = tl.arange(0, MOST)
    row = tl.load(rows + r, mask=r < R, other=0)
    start = tl.load(state + row * 3, mask=r < R, other=0)
    sure = start + tl.load(counts + r, mask=r < R, other=0)
    wrong = tl.sum(((sure > tl.load(state + row * 3 + 1, mask=r < R, other=0)) & (r < R)).to(tl.int32), axis=0)
    tl.store(starts + r, start, mask=r < R)
    tl.store(kv_lens + r, (start + tl.load(widths + r, mask=r < R, other=0)).to(tl.int32), mask=r < R)
    e = tl.arange(0, MOST)
    at = tl.load(emits + e, mask=e < E, other=0)
    line = state + tl.load(rows + at, mask=e < E, other=0) * 3
    there = tl.load(line + 1, mask=e < E, other=0)
    asked = tl.load(line, mask=e < E, other=0) + tl.load(counts + at, mask=e < E, other=0)
    wrong += tl.sum(((asked != there) & (e < E)).to(tl.int32), axis=0)
    tl.store(known + e, there, mask=e < E)
    guesses = tl.minimum(tl.load(drafts + e, mask=e < E, other=0), tl.load(line + 2, mask=e < E, other=0))
    tl.store(drafted + e, guesses, mask=e < E)
    tl.store(fault, tl.minimum(wrong, 1).to(tl.int64))
    t = tl.arange(0, MOST)
    own = tl.load(rows + tl.load(token_rows + t, mask=t < T, other=0), mask=t < T, other=0)
    position = tl.load(state + own * 3, mask=t < T, other=0) + tl.load(offsets + t, mask=t < T, other=0)
    position = tl.minimum(position, last)
    tl.store(positions + t, position, mask=t < T)
    tl.store(ids + t, tl.load(tokens + own * tokens_stride + position, mask=t < T, other=0).to(tl.int64), mask=t < T)
    for group in tl.static_range(GROUPS):
        entry = tables + group * group_stride + own * line_stride + position // PAGE
        slot = tl.load(entry, mask=t < T, other=0).to(tl.int64) * PAGE + position % PAGE
        tl.store(slots + group * T + t, slot, mask=t < T)


@jit(
    do_not_specialize=["R", "WANTED", "nobody"],
    do_not_specialize_on_alignment=[
        "rows", "counts", "firsts", "starts", "known", "drafted", "fault", "sampled", "computed", "after", "accepted",
    ],
)  # fmt: skip
def end_kernel(
    rows: tl.tensor, counts: tl.tensor, firsts: tl.tensor, starts: tl.tensor, known: tl.tensor, drafted: tl.tensor,
    fault: tl.tensor, sampled: tl.tensor, finite: tl.tensor, state: tl.tensor, tokens: tl.tensor,
    tokens_stride: tl.tensor, nobody: tl.tensor, computed: tl.tensor, after: tl.tensor, accepted: tl.tensor,
    report: tl.tensor, R: tl.tensor, WANTED: tl.tensor, DEPTH: tl.constexpr, MOST: tl.constexpr,
) -> None:  # fmt: skip
    """What a step in which every row sampled leaves in the rows, and the report on it."""
    r = tl.arange(0, MOST)
    live = r < R
    row = tl.load(rows + r, mask=live, other=0)
    there, checked = tl.load(known + r, mask=live, other=0), tl.load(drafted + r, mask=live, other=0)
    first = tl.load(firsts + r, mask=live, other=0)
    right = tl.zeros((MOST,), tl.int64)
    agreed = live
    for place in tl.static_range(DEPTH):
        guess = tl.load(tokens + row * tokens_stride + there + place, mask=live, other=0).to(tl.int64)
        found = tl.load(sampled + tl.minimum(first + place, WANTED - 1), mask=live, other=0)
        agreed = agreed & (guess == found) & (place < checked)
        right += agreed.to(tl.int64)
    new = tl.load(sampled + first + right, mask=live, other=0)
    mine = live & (row != nobody)
    tl.store(tokens + row * tokens_stride + there + right, new.to(tl.int32), mask=mine)
    done = tl.load(starts + r, mask=live, other=0) + tl.load(counts + r, mask=live, other=0) + right
    tl.store(state + row * 3, done, mask=mine)
    tl.store(state + row * 3 + 1, there + right + 1, mask=mine)
    tl.store(state + row * 3 + 2, right * 0, mask=mine)
    tl.store(computed + r, done, mask=live)
    tl.store(after + r, there + right + 1, mask=live)
    tl.store(accepted + r, right, mask=live)
    at = tl.arange(0, MOST)
    tl.store(report + at, tl.load(sampled + at, mask=at < WANTED, other=0), mask=at < WANTED)
    bad = tl.sum((tl.load(finite + at, mask=at < WANTED, other=1) == 0).to(tl.int32), axis=0)
    tl.store(report + WANTED + r, right + 1, mask=live)
    tl.store(report + WANTED + R + r, checked, mask=live)
    tl.store(report + WANTED + 2 * R, tl.load(fault) + tl.minimum(bad, 1).to(tl.int64) * 2)
