"""Grouped matrix products of routed experts in Triton, for plain, FP8 block and NVFP4 weights.

Columns of a product are (token, expert) pairs of one expert, rows are outputs: W X^T. So the weights are the operand
that may come from registers, where NVFP4 is decoded, and a tile of 8 or 16 pairs is enough for the matrix units. Every
sum over K is float32. Which pairs a program computes, `srt/layers/moe/triton_dispatch.py` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over
from srt.layers.moe import triton_packing as packing

PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
NVFP4 = tl.constexpr(2)
SORTED = tl.constexpr(0)
"""Pairs sorted by expert, in blocks that a table lists."""
SINGLE = tl.constexpr(1)
"""A block for each pair: nothing to sort."""
DENSE = tl.constexpr(2)
"""One expert that every token uses."""
CODE_MASK = tl.constexpr(0x81C081C0)
"""Where a code's sign, exponent and fraction lie in each of two bfloat16: its value times 2^-126, zero and 0.5
included."""
HIGH_MASK = tl.constexpr(0x81808180)
"""Its sign and exponent."""
LOW_MASK = tl.constexpr(0x00400040)
"""Its fraction."""
SCALE_TOP = tl.constexpr(0x7000)
"""Top exponent bits of a group scale as a bfloat16."""
block_columns = triton.constexpr_function(packing.block_columns)


@triton.jit  # type: ignore[untyped-decorator]
def code_bits(words: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """Code PLACE of each 16-bit word as the bits of a bfloat16, two neighbours to an instruction."""
    if PLACE == 0:
        bits = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x81C081C0;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    elif PLACE == 1:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 a; shl.b32 a, $1, 4; and.b32 $0, a, 0x81C081C0; }",
            "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    elif PLACE == 2:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 a; shf.r.wrap.b32 a, $1, $1, 6; and.b32 $0, a, 0x81C081C0; }",
            "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; shf.r.wrap.b32 a, $1, $1, 2; shl.b32 b, $1, 6; and.b32 a, a, 0x81808180;"
            " and.b32 b, b, 0x00400040; or.b32 $0, a, b; }",
            "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def code_bits_portable(words: tl.tensor, PLACE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr) -> tl.tensor:
    """The same of words [ROWS, WORDS] in plain arithmetic, as int32."""
    first, second = words.to(tl.uint16, bitcast=True).to(tl.uint32).reshape(ROWS, WORDS // 2, 2).split()
    both = first | (second << 16)
    if PLACE == 0:
        bits = both & CODE_MASK
    elif PLACE == 1:
        bits = (both << 4) & CODE_MASK
    elif PLACE == 2:
        bits = ((both >> 6) | (both << 26)) & CODE_MASK
    else:
        bits = (((both >> 2) | (both << 30)) & HIGH_MASK) | ((both << 6) & LOW_MASK)
    return tl.join(bits & 0xFFFF, bits >> 16).reshape(ROWS, WORDS).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def decode(words: tl.tensor, scales: tl.tensor, PLACE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
           PACKED: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Code PLACE of every word times its group's scale, times 2^-8: [ROWS, 16 * GROUPS].

    Shapes: words [ROWS, 16 * GROUPS] int16; scales [ROWS, GROUPS] int32, eight bits for each place.
    A product has at most 6 significant bits: exact in bfloat16.
    """
    if PACKED:
        # Scales 0 and 2 become two bfloat16 in one instruction, 1 and 3 in two.
        if PLACE % 2 == 0:
            pair = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x0FF00FF0, 0x70007000, 0xEA;",
                "=r,r", [scales], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            pair = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shf.r.wrap.b32 a, $1, $1, 8; lop3.b32 $0, a, 0x0FF00FF0, 0x70007000, 0xEA; }",
                "=r,r", [scales], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        codes = code_bits(words, PLACE).to(tl.bfloat16, bitcast=True)
        wide = tl.broadcast_to(pair[:, :, None], (ROWS, GROUPS, 16)).reshape(ROWS, 16 * GROUPS)
        # Both codes are of one group; which half of the pair is theirs, the product's operand says. A product by itself
        # needs SM90; one to which -0 is added is the same number, and on SM90 the same instruction.
        if PLACE < 2:
            value = tl.inline_asm_elementwise(
                "{ .reg .b16 a, b; .reg .b32 s, z; mov.b32 {a, b}, $2; mov.b32 s, {a, a};"
                " mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, s, z; }",
                "=r,r,r,r", [codes, wide], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = tl.inline_asm_elementwise(
                "{ .reg .b16 a, b; .reg .b32 s, z; mov.b32 {a, b}, $2; mov.b32 s, {b, b};"
                " mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, s, z; }",
                "=r,r,r,r", [codes, wide], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        raw = scales.to(tl.uint32, bitcast=True)
        turned = (raw >> (4 + 8 * PLACE)) | (raw << (28 - 8 * PLACE))
        scale = ((turned & 0xFF) << 4 | SCALE_TOP).to(tl.int32)
        wide = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, 16)).reshape(ROWS, 16 * GROUPS)
        number = (code_bits_portable(words, PLACE, ROWS, 16 * GROUPS) << 16).to(tl.float32, bitcast=True)
        value = number * (wide << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def block_of(
    block: tl.tensor, order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor,
    pairs: tl.tensor, EXPERTS: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What block `block` computes: its expert, positions [ROWS], which of them count, and the pairs' numbers.

    The expert of a block that has nothing to do is `EXPERTS`; the rest means nothing then.
    """
    steps = tl.arange(0, ROWS)
    if MODE == SINGLE:
        expert = tl.load(block_expert + block)
        position = tl.zeros((ROWS,), tl.int32) + block
        mine = steps == 0
        slots = position
    elif MODE == DENSE:
        expert = tl.zeros((), tl.int32)
        position = block * ROWS + steps
        mine = position < pairs
        position = tl.where(mine, position, 0)
        slots = position
    else:
        expert = tl.load(block_expert + block)
        first = tl.load(block_row + block)
        end = tl.load(starts + expert + 1, mask=expert < EXPERTS, other=0)
        mine = first + steps < end
        position = tl.where(mine, first + steps, first)
        slots = tl.load(order + position, mask=expert < EXPERTS, other=0)
    return expert, position, mine, slots


@triton.jit  # type: ignore[untyped-decorator]
def input_tile(x: tl.tensor, rows: tl.tensor, k: tl.tensor, K: tl.constexpr, STEP: tl.constexpr) -> tl.tensor:
    """Columns [k, k + STEP) of the activations at these offsets of rows, transposed, zeros beyond K."""
    steps = k + tl.arange(0, STEP)
    if K % STEP == 0:
        tile = tl.load(x + rows[:, None] + steps[None, :])
    else:
        tile = tl.load(x + rows[:, None] + steps[None, :], mask=(steps < K)[None, :], other=0.0)
    return tile.T


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(table: tl.tensor, expert: tl.tensor, start: tl.tensor, rows: tl.tensor, k: tl.tensor, N: tl.constexpr,
            K: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, BEHIND: tl.constexpr,
            TMA: tl.constexpr) -> tl.tensor:  # fmt: skip
    """What stands for columns [k, k + STEP) of the rows `BEHIND` + `rows`, zeros beyond K: [.., STEP / EACH].

    The table, [E, K / BLOCK, N, BLOCK / EACH], has a number for `EACH` columns; a row in one piece is a block of K. The
    rows begin with `start`.
    """
    WIDE: tl.constexpr = BLOCK // EACH
    steps = tl.arange(0, STEP // EACH)
    # Where in a block, and that it is aligned, which the compiler does not see by itself.
    first = k // EACH if BLOCK == K else 0 if BLOCK == STEP else tl.multiple_of(k % BLOCK // EACH, STEP // EACH)
    if TMA:
        tile = table.load([(expert * (K // BLOCK) + k // BLOCK) * N + BEHIND + start, first])
    else:
        own = table + expert.to(tl.int64) * (N * (K // EACH)) + BEHIND * WIDE
        if K % STEP == 0 and STEP <= BLOCK:
            tile = tl.load(own + (k // BLOCK) * (N * WIDE) + rows[:, None] * WIDE + (first + steps)[None, :])
        else:
            places = (k // BLOCK + steps // WIDE) * (N * WIDE) + (first + steps) % WIDE
            # In numbers, not in columns: the compiler sees which are inside together, and loads many at once.
            inside = k // EACH + steps < K // EACH
            tile = tl.load(own + rows[:, None] * WIDE + places[None, :], mask=inside[None, :], other=0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def place_tile(x: tl.tensor, rows: tl.tensor, k: tl.tensor, PLACE: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
               JOINED: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The activations that meet code PLACE of the words of columns [k, k + STEP), transposed.

    Joined: those of all places, one after the other.
    """
    BLOCK: tl.constexpr = block_columns(K)
    steps = tl.arange(0, STEP if JOINED else STEP // 4)
    words = steps % (STEP // 4)
    place = PLACE + steps // (STEP // 4)
    # Runs of neighbours, which the compiler does not see by itself.
    if STEP <= BLOCK:
        RUN: tl.constexpr = STEP // 4
        columns = k // BLOCK * BLOCK + (k % BLOCK) // 4 + place * (BLOCK // 4) + words
        columns = tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)
        tile = tl.load(x + rows[:, None] + columns[None, :])
    else:
        QUARTER: tl.constexpr = BLOCK // 4
        columns = k + words // QUARTER * BLOCK + place * QUARTER + words % QUARTER
        columns = tl.max_contiguous(tl.multiple_of(columns, QUARTER), QUARTER)
        tile = tl.load(x + rows[:, None] + columns[None, :], mask=(columns < K)[None, :], other=0.0)
    return tile.T


@triton.jit  # type: ignore[untyped-decorator]
def decode_places(words: tl.tensor, scales: tl.tensor, PLACE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
                  PACKED: tl.constexpr, JOINED: tl.constexpr) -> tl.tensor:  # fmt: skip
    """`decode` of one place, or of all places, one after the other: in registers, so that a product follows another."""
    value = decode(words, scales, PLACE, ROWS, STEP // 64, PACKED)
    if JOINED:
        first = tl.join(value, decode(words, scales, 1, ROWS, STEP // 64, PACKED))
        last = tl.join(
            decode(words, scales, 2, ROWS, STEP // 64, PACKED), decode(words, scales, 3, ROWS, STEP // 64, PACKED)
        )
        first, last = first.permute(0, 2, 1).reshape(ROWS, STEP // 2), last.permute(0, 2, 1).reshape(ROWS, STEP // 2)
        value = tl.join(first, last).permute(0, 2, 1).reshape(ROWS, STEP)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def gated(gate: tl.tensor, up: tl.tensor, limit: tl.tensor, CLAMP: tl.constexpr) -> tl.tensor:
    """min(silu(gate), limit) * clamp(up, -limit, limit)."""
    activated = gate / (1.0 + tl.exp(-gate))
    if CLAMP:
        activated = tl.minimum(activated, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return activated * up


@jit(do_not_specialize=["pairs"])
def gate_up_kernel(
    x: tl.tensor, x_scale: tl.tensor, x_stride: tl.tensor, w: tl.tensor, w_scale: tl.tensor, matrix: tl.tensor,
    inner: tl.tensor, order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor,
    pairs: tl.tensor, limit: tl.tensor, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    TOP_K: tl.constexpr, CLAMP: tl.constexpr, KIND: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, JOINED: tl.constexpr,
    SHARES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """inner[position] = min(silu(gate), limit) * clamp(up, -limit, limit), for this program's pairs and columns.

    With several shares of K: inner[share, position] = gate, up in float32, for `activate_kernel`.
    """
    BLOCK: tl.constexpr = block_columns(K) if KIND == NVFP4 else K
    take_over(PDL)
    expert, position, mine, slots = block_of(
        tl.program_id(1), order, starts, block_expert, block_row, pairs, EXPERTS, MODE, ROWS
    )
    if expert < EXPERTS:
        rows = (slots // TOP_K).to(tl.int64) * x_stride
        start = tl.program_id(0) * COLUMNS
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        own = columns if WIDTH % COLUMNS == 0 else tl.minimum(columns, WIDTH - 1)
        gate = tl.zeros((COLUMNS, ROWS), tl.float32)
        up = tl.zeros((COLUMNS, ROWS), tl.float32)
        begin = tl.program_id(2) * (K // SHARES) if SHARES > 1 else 0
        if KIND == NVFP4:
            for k in range(begin, begin + K // SHARES, STEP):
                gate_words = tile_of(w, expert, start, own, k, 2 * WIDTH, K, STEP, BLOCK, 4, 0, False)
                gate_scales = tile_of(w_scale, expert, start, own, k, 2 * WIDTH, K, STEP, BLOCK, 64, 0, False)
                up_words = tile_of(w, expert, start, own, k, 2 * WIDTH, K, STEP, BLOCK, 4, WIDTH, False)
                up_scales = tile_of(w_scale, expert, start, own, k, 2 * WIDTH, K, STEP, BLOCK, 64, WIDTH, False)
                for place in tl.static_range(1 if JOINED else 4):
                    tile = place_tile(x, rows, k, place, K, STEP, JOINED)
                    a = decode_places(gate_words, gate_scales, place, COLUMNS, STEP, PACKED, JOINED)
                    gate = tl.dot(a.to(tile.dtype), tile, gate, input_precision="ieee")
                    a = decode_places(up_words, up_scales, place, COLUMNS, STEP, PACKED, JOINED)
                    up = tl.dot(a.to(tile.dtype), tile, up, input_precision="ieee")
            gate *= tl.load(matrix + expert * 2)
            up *= tl.load(matrix + expert * 2 + 1)
        elif KIND == FP8:
            scales = x_scale + (slots // TOP_K).to(tl.int64) * (K // 128)
            gate_scales = w_scale + ((expert * 2 * WIDTH + start) // 128).to(tl.int64) * (K // 128)
            up_scales = w_scale + (((expert * 2 + 1) * WIDTH + start) // 128).to(tl.int64) * (K // 128)
            for k in range(begin, begin + K // SHARES, 128):
                tile, scale = input_tile(x, rows, k, K, 128), tl.load(scales + k // 128)
                gate_scale, up_scale = tl.load(gate_scales + k // 128), tl.load(up_scales + k // 128)
                part = tl.dot(tile_of(w, expert, start, own, k, 2 * WIDTH, K, 128, BLOCK, 1, 0, TMA), tile)
                gate += part * (scale * gate_scale)[None, :]
                part = tl.dot(tile_of(w, expert, start, own, k, 2 * WIDTH, K, 128, BLOCK, 1, WIDTH, TMA), tile)
                up += part * (scale * up_scale)[None, :]
        else:
            for k in range(begin, begin + K // SHARES, STEP):
                tile = input_tile(x, rows, k, K, STEP)
                a = tile_of(w, expert, start, own, k, 2 * WIDTH, K, STEP, BLOCK, 1, 0, TMA)
                gate = tl.dot(a, tile, gate, input_precision="ieee")
                a = tile_of(w, expert, start, own, k, 2 * WIDTH, K, STEP, BLOCK, 1, WIDTH, TMA)
                up = tl.dot(a, tile, up, input_precision="ieee")
        here = mine[None, :] & inside[:, None]
        if SHARES > 1:
            share = tl.program_id(2) * pairs + position[None, :]
            target = inner + share.to(tl.int64) * (2 * WIDTH) + columns[:, None]
            tl.store(target, gate, mask=here)
            tl.store(target + WIDTH, up, mask=here)
        else:
            target = inner + position[None, :].to(tl.int64) * WIDTH + columns[:, None]
            tl.store(target, gated(gate, up, limit, CLAMP).to(inner.dtype.element_ty), mask=here)


@jit(do_not_specialize=["pairs"])
def down_kernel(
    inner: tl.tensor, inner_scale: tl.tensor, w: tl.tensor, w_scale: tl.tensor, matrix: tl.tensor, out: tl.tensor,
    order: tl.tensor, starts: tl.tensor, block_expert: tl.tensor, block_row: tl.tensor, pairs: tl.tensor,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, KIND: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    JOINED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """out[pair] = down(inner[position]): back in the order of tokens, not yet weighted."""
    BLOCK: tl.constexpr = block_columns(WIDTH) if KIND == NVFP4 else WIDTH
    take_over(PDL)
    expert, position, mine, slots = block_of(
        tl.program_id(1), order, starts, block_expert, block_row, pairs, EXPERTS, MODE, ROWS
    )
    if expert < EXPERTS:
        rows = position.to(tl.int64) * WIDTH
        start = tl.program_id(0) * COLUMNS
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < HIDDEN
        own = columns if HIDDEN % COLUMNS == 0 else tl.minimum(columns, HIDDEN - 1)
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
        if KIND == NVFP4:
            for k in range(0, WIDTH, STEP):
                words = tile_of(w, expert, start, own, k, HIDDEN, WIDTH, STEP, BLOCK, 4, 0, False)
                scales = tile_of(w_scale, expert, start, own, k, HIDDEN, WIDTH, STEP, BLOCK, 64, 0, False)
                for place in tl.static_range(1 if JOINED else 4):
                    tile = place_tile(inner, rows, k, place, WIDTH, STEP, JOINED)
                    a = decode_places(words, scales, place, COLUMNS, STEP, PACKED, JOINED)
                    total = tl.dot(a.to(tile.dtype), tile, total, input_precision="ieee")
            total *= tl.load(matrix + expert)
        elif KIND == FP8:
            scales = inner_scale + position.to(tl.int64) * (WIDTH // 128)
            weight_scales = w_scale + ((expert * HIDDEN + start) // 128).to(tl.int64) * (WIDTH // 128)
            for k in range(0, WIDTH, 128):
                tile, scale = input_tile(inner, rows, k, WIDTH, 128), tl.load(scales + k // 128)
                weight_scale = tl.load(weight_scales + k // 128)
                part = tl.dot(tile_of(w, expert, start, own, k, HIDDEN, WIDTH, 128, BLOCK, 1, 0, TMA), tile)
                total += part * (scale * weight_scale)[None, :]
        else:
            for k in range(0, WIDTH, STEP):
                tile = input_tile(inner, rows, k, WIDTH, STEP)
                a = tile_of(w, expert, start, own, k, HIDDEN, WIDTH, STEP, BLOCK, 1, 0, TMA)
                total = tl.dot(a, tile, total, input_precision="ieee")
        target = out + slots[None, :].to(tl.int64) * HIDDEN + columns[:, None]
        tl.store(target, total.to(out.dtype.element_ty), mask=mine[None, :] & inside[:, None])


@jit(do_not_specialize=["pairs"])
def activate_kernel(
    parts: tl.tensor, inner: tl.tensor, pairs: tl.tensor, limit: tl.tensor, WIDTH: tl.constexpr,
    SHARES: tl.constexpr, CLAMP: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """inner[position] from the shares of gate and up that `gate_up_kernel` left, added in their order."""
    position = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    gate = tl.zeros((COLUMNS,), tl.float32)
    up = tl.zeros((COLUMNS,), tl.float32)
    take_over(PDL)
    for share in tl.static_range(SHARES):
        part = parts + (share * pairs + position).to(tl.int64) * (2 * WIDTH) + columns
        gate += tl.load(part, mask=inside, other=0.0)
        up += tl.load(part + WIDTH, mask=inside, other=0.0)
    target = inner + position.to(tl.int64) * WIDTH + columns
    tl.store(target, gated(gate, up, limit, CLAMP).to(inner.dtype.element_ty), mask=inside)
