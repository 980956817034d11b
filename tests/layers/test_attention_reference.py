"""Paged attention against a dense softmax over the same keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.rope import rotate

HEADS, KV_HEADS, SIZE, ROTARY, PAGE = 6, 2, 8, 4, 4


def spec(window: int | None) -> AttentionSpec:
    generator = torch.Generator().manual_seed(5)
    angles = torch.arange(64.0)[:, None] * torch.tensor([1.0, 0.1])
    return AttentionSpec(
        layer=0, group=0, q_heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, rotary_dim=ROTARY, window=window,
        scale=SIZE**-0.5, q_norm=0.3 * torch.randn(SIZE, generator=generator),
        k_norm=0.3 * torch.randn(SIZE, generator=generator), rope=torch.cat([angles.cos(), angles.sin()], -1), eps=1e-5,
    )  # fmt: skip


def batch_of(starts: list[int], lengths: list[int], tables: Tensor) -> ForwardBatch:
    """Rows that already hold `starts` keys and compute `lengths` more."""
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(lengths))
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    kv_lens = [a + n for a, n in zip(starts, lengths, strict=True)]
    return ForwardBatch(
        input_ids=torch.zeros_like(positions), positions=positions, query_starts=torch.tensor(ends, dtype=torch.int32),
        query_starts_list=ends, kv_lens=torch.tensor(kv_lens, dtype=torch.int32), kv_lens_list=kv_lens,
        page_tables=(tables,), slots=(tables[rows, positions // PAGE].long() * PAGE + positions % PAGE,),
        logit_tokens=torch.tensor([], dtype=torch.int64), page_size=PAGE,
    )  # fmt: skip


def dense(qkv: Tensor, gates: Tensor, attention: AttentionSpec) -> Tensor:
    """One sequence from position 0, without pages, in float64: [N, (Hq + 2 Hkv) * D], [N, Hq] -> [N, Hq * D]."""
    count = len(qkv)
    q, k, v = torch.split(qkv.double().view(count, -1, SIZE), [HEADS, KV_HEADS, KV_HEADS], dim=1)
    table = attention.rope.double()[:count]

    def prepared(x: Tensor, gain: Tensor) -> Tensor:
        return rotate(x / (x.square().mean(-1, keepdim=True) + attention.eps).sqrt() * (1 + gain.double()), table)

    q, k = prepared(q, attention.q_norm), prepared(k, attention.k_norm)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
    distance = torch.arange(count)[:, None] - torch.arange(count)[None, :]
    seen = (distance >= 0) & (distance < (attention.window or count))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    heads = torch.einsum("hqk,khd->qhd", weights, v) * gates.double().sigmoid()[..., None]
    return heads.reshape(count, -1)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("cuts", [[13, 9], [1, 1], [6, 4], [12, 5]])
def test_ragged_rows_in_two_steps_equal_one_dense_softmax(window: int | None, cuts: list[int]) -> None:
    attention, backend, lengths = spec(window), ReferenceAttention(), [13, 9]
    generator = torch.Generator().manual_seed(1)
    width = (HEADS + 2 * KV_HEADS) * SIZE
    rows = [torch.randn(n, width, generator=generator) for n in lengths]
    gates = [torch.randn(n, HEADS, generator=generator) for n in lengths]
    tables = torch.tensor([[3, 7, 1, 5], [2, 8, 6, 0]], dtype=torch.int32)
    memory = KVLayer(*(torch.full((9, PAGE, KV_HEADS, SIZE), 777.0) for _ in range(2)))
    got: list[list[Tensor]] = [[], []]
    for begin, end in (([0, 0], cuts), (cuts, lengths)):
        live = [row for row in range(2) if end[row] > begin[row]]
        if not live:
            continue
        step = batch_of([begin[r] for r in live], [end[r] - begin[r] for r in live], tables[live])
        backend.begin(step)
        qkv = torch.cat([rows[r][begin[r] : end[r]] for r in live])
        q = backend.store(qkv, attention, memory, step)
        out = backend.attend(q, torch.cat([gates[r][begin[r] : end[r]] for r in live]), attention, memory, step)
        for at, row in enumerate(live):
            got[row].append(out[step.query_starts_list[at] : step.query_starts_list[at + 1]])
    for row in range(2):
        expected = dense(rows[row], gates[row], attention)
        assert torch.allclose(torch.cat(got[row]).double(), expected, atol=1e-5)


def test_keys_and_values_land_in_their_slots_and_nowhere_else() -> None:
    attention, backend = spec(None), ReferenceAttention()
    memory = KVLayer(*(torch.zeros(4, PAGE, KV_HEADS, SIZE) for _ in range(2)))
    step = batch_of([2], [3], torch.tensor([[3, 1]], dtype=torch.int32))
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * SIZE + 1, generator=torch.Generator().manual_seed(2))[:, :-1]
    backend.store(qkv, attention, memory, step)
    written = memory.v.abs().sum((-1, -2)).nonzero().tolist()
    assert written == [[1, 0], [3, 2], [3, 3]]
    assert torch.equal(memory.v[3, 2].flatten(), qkv[0, -KV_HEADS * SIZE :])
