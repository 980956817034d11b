"""Grouped matrix products of routed experts in Triton, for plain, FP8 block and NVFP4 weights.

Rows are (token, expert) pairs sorted by expert. A program computes `ROWS` pairs of one expert by `COLUMNS` outputs;
which pairs, a table says (`srt/layers/moe/triton_experts.py`, `Schedule`). Every sum over K is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
NVFP4 = tl.constexpr(2)
E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit  # type: ignore[untyped-decorator]
def e2m1(codes: tl.tensor) -> tl.tensor:
    """Four-bit codes (uint8) to float32: the exponent and fraction moved into place, 0.5 apart."""
    magnitude = (codes & 7).to(tl.int32)
    normal = (magnitude + 252) << 22
    bits = tl.where(magnitude < 2, magnitude * (126 << 23), normal) | ((codes & 8).to(tl.int32) << 28)
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def plain_step(
    total: tl.tensor, x: tl.tensor, rows: tl.tensor, w: tl.tensor, columns: tl.tensor, inside: tl.tensor, k: tl.tensor,
    K: tl.constexpr, STEP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add the product of columns [k, k + STEP) of x and w; x and w are pointers to rows, element (0, 0)."""
    steps = k + tl.arange(0, STEP)
    within = steps < K
    a = tl.load(x + rows[:, None] + steps[None, :], mask=within[None, :], other=0.0)
    b = tl.load(w + columns[None, :] * K + steps[:, None], mask=within[:, None] & inside[None, :], other=0.0)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def fp8_step(
    total: tl.tensor, x: tl.tensor, x_scale: tl.tensor, rows: tl.tensor, w: tl.tensor, w_scale: tl.tensor,
    columns: tl.tensor, block: tl.tensor, k: tl.tensor, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add one block of 128 columns: codes by codes, then the scales of the tokens and of the weight's block."""
    steps = k + tl.arange(0, 128)
    a = tl.load(x + rows[:, None] * K + steps[None, :])
    b = tl.load(w + columns[None, :] * K + steps[:, None])
    scale = tl.load(x_scale + rows * (K // 128) + k // 128) * tl.load(w_scale + block * (K // 128) + k // 128)
    return total + tl.dot(a, b) * scale[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def nvfp4_step(
    total: tl.tensor, x: tl.tensor, rows: tl.tensor, w: tl.tensor, group: tl.tensor, columns: tl.tensor,
    inside: tl.tensor, k: tl.tensor, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add 64 columns. A byte holds a code of the first 32 columns (low) and one of the other 32 (high).

    A code times its group's scale has at most 6 significant bits: exact in bfloat16.
    """
    steps = tl.arange(0, 32)
    packed = tl.load(w + columns[None, :] * (K // 2) + k // 2 + steps[:, None], mask=inside[None, :], other=0)
    scales = group + columns[None, :] * (K // 16) + k // 16 + steps[:, None] // 16
    low_scale = tl.load(scales, mask=inside[None, :], other=0.0).to(tl.float32)
    high_scale = tl.load(scales + 2, mask=inside[None, :], other=0.0).to(tl.float32)
    low = tl.load(x + rows[:, None] + k + steps[None, :])
    high = tl.load(x + rows[:, None] + k + 32 + steps[None, :])
    total = tl.dot(low, (e2m1(packed & 15) * low_scale).to(low.dtype), total, input_precision="ieee")
    return tl.dot(high, (e2m1(packed >> 4) * high_scale).to(high.dtype), total, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def gate_up_kernel(
    x: tl.tensor, x_scale: tl.tensor, x_stride: tl.tensor, w: tl.tensor, w_scale: tl.tensor, matrix: tl.tensor,
    inner: tl.tensor, order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor,
    limit: tl.tensor, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    CLAMP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """inner[pair] = min(silu(gate), limit) * clamp(up, -limit, limit), for the pairs and columns of this program."""
    expert = tl.load(block_expert + tl.program_id(1)).to(tl.int64)
    if expert < EXPERTS:
        pairs = tl.load(block_row + tl.program_id(1)) + tl.arange(0, ROWS)
        mine = pairs < tl.load(starts + expert + 1)
        tokens = (tl.load(order + pairs, mask=mine, other=0) // TOP_K).to(tl.int64)
        first = tl.program_id(0) * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        base = expert * 2 * WIDTH
        if KIND == NVFP4:
            packed, group, rows = w + base * (K // 2), w_scale + base * (K // 16), tokens * x_stride
            for k in range(0, K, 64):
                gate = nvfp4_step(gate, x, rows, packed, group, columns, inside, k, K)
                up = nvfp4_step(up, x, rows, packed, group, columns + WIDTH, inside, k, K)
            gate *= tl.load(matrix + expert * 2)
            up *= tl.load(matrix + expert * 2 + 1)
        elif KIND == FP8:
            codes, blocks = w + base * K, w_scale + base // 128 * (K // 128)
            for k in range(0, K, 128):
                gate = fp8_step(gate, x, x_scale, tokens, codes, blocks, columns, first // 128, k, K)
                up = fp8_step(up, x, x_scale, tokens, codes, blocks, columns + WIDTH, (first + WIDTH) // 128, k, K)
        else:
            matrices, rows = w + base * K, tokens * x_stride
            for k in range(0, K, STEP):
                gate = plain_step(gate, x, rows, matrices, columns, inside, k, K, STEP)
                up = plain_step(up, x, rows, matrices, columns + WIDTH, inside, k, K, STEP)
        activated = gate / (1.0 + tl.exp(-gate))
        if CLAMP:
            activated = tl.minimum(activated, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        target = inner + pairs[:, None].to(tl.int64) * WIDTH + columns[None, :]
        tl.store(target, (activated * up).to(inner.dtype.element_ty), mask=mine[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def down_kernel(
    inner: tl.tensor, inner_scale: tl.tensor, w: tl.tensor, w_scale: tl.tensor, matrix: tl.tensor, out: tl.tensor,
    order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor, EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out[order[pair]] = down(inner[pair]): back in the order of tokens, not yet weighted."""
    expert = tl.load(block_expert + tl.program_id(1)).to(tl.int64)
    if expert < EXPERTS:
        pairs = tl.load(block_row + tl.program_id(1)) + tl.arange(0, ROWS)
        mine = pairs < tl.load(starts + expert + 1)
        first = tl.program_id(0) * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < HIDDEN
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        safe = tl.where(mine, pairs, 0).to(tl.int64)
        base = expert * HIDDEN
        if KIND == NVFP4:
            packed, group = w + base * (WIDTH // 2), w_scale + base * (WIDTH // 16)
            for k in range(0, WIDTH, 64):
                total = nvfp4_step(total, inner, safe * WIDTH, packed, group, columns, inside, k, WIDTH)
            total *= tl.load(matrix + expert)
        elif KIND == FP8:
            codes, blocks = w + base * WIDTH, w_scale + base // 128 * (WIDTH // 128)
            for k in range(0, WIDTH, 128):
                total = fp8_step(total, inner, inner_scale, safe, codes, blocks, columns, first // 128, k, WIDTH)
        else:
            matrices = w + base * WIDTH
            for k in range(0, WIDTH, STEP):
                total = plain_step(total, inner, safe * WIDTH, matrices, columns, inside, k, WIDTH, STEP)
        slots = tl.load(order + pairs, mask=mine, other=0).to(tl.int64)
        target = out + slots[:, None] * HIDDEN + columns[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=mine[:, None] & inside[None, :])


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


@triton.jit  # type: ignore[untyped-decorator]
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
