"""The router in Triton: logits of all experts in float32, and the choice of each token's experts.

Few tokens take one kernel, whose last program chooses. With more the logits are products of matrices, shared out along
K, and another kernel chooses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srt.layers.cuda.arrivals import last_to_arrive
from srt.layers.cuda.jit import jit
from srt.layers.cuda.launch import take_over

LOWEST = tl.constexpr(-(2**31))


@jit(do_not_specialize=["tokens"])
def route_few_kernel(
    x: tl.tensor, x_stride: tl.tensor, weight: tl.tensor, bias: tl.tensor, logits: tl.tensor, counter: tl.tensor,
    ids: tl.tensor, weights: tl.tensor, tokens: tl.tensor, factor: tl.tensor, SIZE: tl.constexpr, PADDED: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Logits of up to `COUNT` tokens for some experts, whose weights are there before the tokens are; the last program
    chooses for all tokens."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, PADDED)
    inside, within = columns < EXPERTS, steps < SIZE
    own = tl.load(weight + columns[:, None] * SIZE + steps[None, :], mask=inside[:, None] & within[None, :], other=0.0)
    biases = biases_of(bias, EXPERTS, LANES)
    take_over(PDL)
    given: tl.tuple = ()
    for token in tl.static_range(COUNT):
        given += (tl.load(x + token * x_stride + steps, mask=within & (token < tokens), other=0.0),)
    for token in tl.static_range(COUNT):
        logit = tl.sum(own * given[token].to(tl.float32)[None, :], axis=1)
        tl.store(logits + token * EXPERTS + columns, logit, mask=inside & (token < tokens))
    last = last_to_arrive(counter, tl.num_programs(0))
    if last:
        choose(logits, biases, ids, weights, 0, tokens, factor, EXPERTS, 1, TOP_K, LANES, COUNT)


@jit(do_not_specialize=["tokens"])
def router_logits_kernel(
    x: tl.tensor, x_stride: tl.tensor, weight: tl.tensor, partial: tl.tensor, tokens: tl.tensor, SIZE: tl.constexpr,
    EXPERTS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """partial[s] = x[:, share s] weight[:, share s]^T: a block of tokens by a block of experts over one share of K."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(2)
    live, inside = rows < tokens, columns < EXPERTS
    take_over(PDL)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, SHARE, STEP):
        steps = share * SHARE + k + tl.arange(0, STEP)
        within = steps < SIZE
        a = tl.load(x + rows[:, None] * x_stride + steps[None, :], mask=live[:, None] & within[None, :], other=0.0)
        b = tl.load(
            weight + columns[None, :] * SIZE + steps[:, None], mask=inside[None, :] & within[:, None], other=0.0
        )
        if a.dtype == tl.bfloat16:
            # Three bfloat16 numbers are a float32 one; x is exact, so only the sums round.
            high = b.to(tl.bfloat16)
            rest = b - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            total = tl.dot(a, high, total)
            total = tl.dot(a, middle, total)
            total = tl.dot(a, (rest - middle.to(tl.float32)).to(tl.bfloat16), total)
        else:
            total = tl.dot(a.to(tl.float32), b, total, input_precision="ieee")
    target = partial + (share.to(tl.int64) * tokens + rows[:, None]) * EXPERTS + columns[None, :]
    tl.store(target, total, mask=live[:, None] & inside[None, :])


@jit(do_not_specialize=["tokens"])
def choose_kernel(
    partial: tl.tensor, bias: tl.tensor, ids: tl.tensor, weights: tl.tensor, tokens: tl.tensor, factor: tl.tensor,
    EXPERTS: tl.constexpr, SHARES: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The choice for one token."""
    token = tl.program_id(0).to(tl.int64)
    biases = biases_of(bias, EXPERTS, LANES)
    take_over(PDL)
    choose(partial, biases, ids, weights, token, tokens, factor, EXPERTS, SHARES, TOP_K, LANES, 1)


@triton.jit  # type: ignore[untyped-decorator]
def biases_of(bias: tl.tensor, EXPERTS: tl.constexpr, LANES: tl.constexpr) -> tl.tuple:
    """The biases of all experts in blocks of `LANES`."""
    biases: tl.tuple = ()
    for block in tl.static_range((EXPERTS + LANES - 1) // LANES):
        expert = block * LANES + tl.arange(0, LANES)[None, :]
        biases += (tl.load(bias + expert, mask=expert < EXPERTS, other=0.0),)
    return biases


@triton.jit  # type: ignore[untyped-decorator]
def choose(
    partial: tl.tensor, biases: tl.tuple, ids: tl.tensor, weights: tl.tensor, first: tl.tensor, tokens: tl.tensor,
    factor: tl.tensor, EXPERTS: tl.constexpr, SHARES: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """The experts of `COUNT` tokens: largest sigmoid(logit) + bias, the lowest number among equals.

    A token has a warp to itself, so that no warp waits for another; each thread has every `LANES`th expert. Scores are
    compared as integers, of which a warp finds the largest in one instruction.
    """
    BLOCKS: tl.constexpr = (EXPERTS + LANES - 1) // LANES
    token = (first + tl.arange(0, COUNT))[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    keys: tl.tuple = ()
    scores: tl.tuple = ()
    for block in tl.static_range(BLOCKS):
        expert = block * LANES + lanes
        inside = (token < tokens) & (expert < EXPERTS)
        logit = tl.zeros((COUNT, LANES), tl.float32)
        for share in tl.static_range(SHARES):
            part = partial + (share * tokens + token) * EXPERTS + expert
            logit += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
        score = 1.0 / (1.0 + tl.exp(-logit))
        keys += (tl.where(expert < EXPERTS, ordered(score + biases[block]), LOWEST),)
        scores += (score.to(tl.int32, bitcast=True),)
    chosen = tl.zeros((COUNT, LANES), tl.int32)
    taken = tl.zeros((COUNT, LANES), tl.int32)
    for place in tl.static_range(TOP_K):
        best = keys[0]
        for block in tl.static_range(1, BLOCKS):
            best = tl.maximum(best, keys[block])
        best = tl.max(best, axis=1)[:, None]
        number = tl.full((COUNT, LANES), BLOCKS * LANES, tl.int32)
        for block in tl.static_range(BLOCKS):
            number = tl.minimum(number, tl.where(keys[block] == best, block * LANES + lanes, BLOCKS * LANES))
        number = tl.min(number, axis=1)[:, None]
        score = tl.zeros((COUNT, LANES), tl.int32)
        left: tl.tuple = ()
        for block in tl.static_range(BLOCKS):
            own = block * LANES + lanes == number
            score = tl.where(own, scores[block], score)
            left += (tl.where(own, LOWEST, keys[block]),)
        keys = left
        chosen = tl.where(lanes == place, number, chosen)
        taken = tl.where(lanes == place, tl.max(score, axis=1)[:, None], taken)
    weight = taken.to(tl.float32, bitcast=True)
    weight = weight * (factor / (tl.sum(weight, axis=1)[:, None] + 1e-20))
    kept = (token < tokens) & (lanes < TOP_K)
    tl.store(ids + token * TOP_K + lanes, chosen, mask=kept)
    tl.store(weights + token * TOP_K + lanes, weight, mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def ordered(number: tl.tensor) -> tl.tensor:
    """Integers that stand in the order of these float32 numbers."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
