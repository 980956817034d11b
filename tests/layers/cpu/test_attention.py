from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cpu.attention import CpuAttention
from srt.layers.cpu.kernels import Kernels
from tests.layers.cpu.support import DTYPES, assert_close, random

EPS = 1e-5
POSITIONS = 700


class Sequence(NamedTuple):
    """A row: its whole qkv and gates, of which the first `done` tokens were computed in earlier steps."""

    qkv: Tensor
    gates: Tensor
    done: int


def _spec(
    dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int, rotary: int, window: int | None
) -> AttentionSpec:
    angles = torch.arange(POSITIONS)[:, None] * 0.7 ** torch.arange(rotary // 2)[None]
    return AttentionSpec(
        layer=0,
        group=0,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary,
        window=window,
        scale=head_dim**-0.5,
        q_norm=random(head_dim, dtype=dtype, scale=0.3),
        k_norm=random(head_dim, dtype=dtype, scale=0.3),
        rope=torch.cat([angles.cos(), angles.sin()], dim=-1).float(),
        eps=EPS,
    )


def _sequence(spec: AttentionSpec, length: int, done: int) -> Sequence:
    dtype = spec.q_norm.dtype
    width = (spec.q_heads + 2 * spec.kv_heads) * spec.head_dim
    # Products of queries and keys are large enough for the softmax to be far from flat.
    return Sequence(random(length, width, dtype=dtype, scale=2.0), random(length, spec.q_heads, dtype=dtype), done)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + weight.double())


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    half = rope.shape[1] // 2
    cos, sin = rope[: x.shape[0], None, :half].double(), rope[: x.shape[0], None, half:].double()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _heads(spec: AttentionSpec, row: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """q, k after norm and rotation, and v, in float64."""
    split = [spec.q_heads, spec.kv_heads, spec.kv_heads]
    q, k, v = torch.split(row.qkv.double().view(row.qkv.shape[0], -1, spec.head_dim), split, dim=1)
    return _rotated(_normed(q, spec.q_norm), spec.rope), _rotated(_normed(k, spec.k_norm), spec.rope), v


def _expected(spec: AttentionSpec, row: Sequence) -> Tensor:
    """Attention of the row's new tokens in float64: [new, Hq * D]."""
    q, k, v = _heads(spec, row)
    group = spec.q_heads // spec.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
    seen = (distance >= 0) & (distance < (spec.window or POSITIONS))
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v) * row.gates.double().sigmoid()[..., None]
    return out.reshape(len(q), -1)[row.done :]


class Pages:
    """A pool full of NaN, out of which rows get pages in random order. Pages that a row can no longer see, and the
    places past its end, keep their NaN."""

    def __init__(self, spec: AttentionSpec, page_size: int, tokens: int) -> None:
        self.spec, self.page_size = spec, page_size
        count = -(-tokens // page_size) + 40
        shape = (count + 1, page_size, spec.kv_heads, spec.head_dim)
        dtype = spec.q_norm.dtype
        self.kv = KVLayer(torch.full(shape, math.nan, dtype=dtype), torch.full(shape, math.nan, dtype=dtype))
        self._free = (torch.randperm(count) + 1).tolist()

    def table(self, length: int, done: int) -> list[int]:
        """Pages of a row whose next query is `done`; pages before its window are the null page."""
        first = 0 if self.spec.window is None else max(0, done - self.spec.window + 1)
        return [
            self._free.pop() if (p + 1) * self.page_size > first else 0 for p in range(-(-length // self.page_size))
        ]

    def slots(self, table: list[int], positions: range) -> Tensor:
        return torch.tensor([table[p // self.page_size] * self.page_size + p % self.page_size for p in positions])


def _batch(rows: list[Sequence], tables: list[list[int]], pages: Pages) -> ForwardBatch:
    news = [range(row.done, len(row.qkv)) for row in rows]
    starts = torch.tensor([0, *(len(new) for new in news)]).cumsum(0)
    lens = [len(row.qkv) for row in rows]
    width = max(len(table) for table in tables)
    padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
    slots = torch.cat([pages.slots(table, new) for table, new in zip(tables, news, strict=True)])
    return ForwardBatch(
        input_ids=torch.zeros(int(starts[-1]), dtype=torch.int64),
        positions=torch.cat([torch.tensor(list(new), dtype=torch.int64) for new in news]),
        query_starts=starts.to(torch.int32),
        query_starts_list=starts.tolist(),
        kv_lens=torch.tensor(lens, dtype=torch.int32),
        kv_lens_list=lens,
        page_tables=(padded,),
        slots=(slots,),
        logit_tokens=starts[1:] - 1,
        page_size=pages.page_size,
    )


def _step(backend: CpuAttention, pages: Pages, rows: list[Sequence], tables: list[list[int]]) -> list[Tensor]:
    """Store and attend to the new tokens of each row."""
    spec, batch = pages.spec, _batch(rows, tables, pages)
    backend.begin(batch)
    news = torch.cat([torch.cat([row.qkv, row.gates], dim=1)[row.done :] for row in rows])
    size = rows[0].qkv.shape[1]
    q = backend.store(news[:, :size], spec, pages.kv, batch)
    out = backend.attend(q, news[:, size:], spec, pages.kv, batch)
    return list(torch.split(out, [len(row.qkv) - row.done for row in rows]))


def _run(kernels: Kernels, spec: AttentionSpec, page_size: int, rows: list[Sequence]) -> list[Tensor]:
    """One step over rows whose earlier tokens are already stored, one row after the other."""
    backend = CpuAttention(kernels)
    pages = Pages(spec, page_size, sum(len(row.qkv) for row in rows))
    tables = [pages.table(len(row.qkv), row.done) for row in rows]
    for row, table in zip(rows, tables, strict=True):
        first = 0 if spec.window is None else max(0, row.done - spec.window + 1)
        if first < row.done:
            past = _batch([Sequence(row.qkv[: row.done], row.gates[: row.done], first)], [table], pages)
            backend.begin(past)
            backend.store(row.qkv[first : row.done], spec, pages.kv, past)
    return _step(backend, pages, rows, tables)


RAGGED = [(1, 0), (5, 0), (64, 63), (65, 64), (200, 199), (130, 1), (300, 250), (63, 0), (128, 100), (37, 36)]

# (q_heads, kv_heads, head_dim, rotary)
GEOMETRIES = [(8, 4, 64, 32), (12, 4, 64, 64), (3, 1, 16, 8), (4, 4, 128, 64), (2, 1, 40, 6)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window", [None, 4, 64, 100])
@pytest.mark.parametrize("geometry", GEOMETRIES[:3])
def test_a_ragged_batch_of_chunks_and_decodes_equals_dense_attention(
    kernels: Kernels, dtype: torch.dtype, page_size: int, window: int | None, geometry: tuple[int, int, int, int]
) -> None:
    spec = _spec(dtype, *geometry, window)
    rows = [_sequence(spec, *lengths) for lengths in RAGGED]
    for row, out in zip(rows, _run(kernels, spec, page_size, rows), strict=True):
        assert_close(out, _expected(spec, row))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_head_geometry_is_computed_right(
    kernels: Kernels, dtype: torch.dtype, geometry: tuple[int, int, int, int]
) -> None:
    spec = _spec(dtype, *geometry, None)
    rows = [_sequence(spec, 150, 0), _sequence(spec, 90, 89)]
    for row, out in zip(rows, _run(kernels, spec, 16, rows), strict=True):
        assert_close(out, _expected(spec, row))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("length", [1, 2, 62, 63, 64, 65, 66, 127, 128, 129, 130])
def test_a_window_ends_at_its_last_key(kernels: Kernels, window: int, length: int) -> None:
    spec = _spec(torch.float32, 4, 2, 16, 8, window)
    for done in {0, length // 2, length - 1}:
        row = _sequence(spec, length, done)
        assert_close(_run(kernels, spec, 16, [row])[0], _expected(spec, row))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_keys_are_normed_and_rotated_and_values_are_copied(kernels: Kernels, dtype: torch.dtype) -> None:
    spec = _spec(dtype, 6, 2, 48, 20, None)
    row = _sequence(spec, 50, 0)
    pages = Pages(spec, 16, 50)
    table = pages.table(50, 0)
    batch = _batch([row], [table], pages)
    backend = CpuAttention(kernels)
    backend.begin(batch)
    q = backend.store(row.qkv, spec, pages.kv, batch)
    expected_q, expected_k, _ = _heads(spec, row)
    written = batch.slots[0]
    keys, values = (memory.view(-1, spec.kv_heads, spec.head_dim) for memory in (pages.kv.k, pages.kv.v))
    assert_close(q, expected_q, 1e-5 if dtype is torch.float32 else 4e-3)
    assert_close(keys[written], expected_k, 1e-5 if dtype is torch.float32 else 4e-3)
    v = row.qkv.view(50, -1, spec.head_dim)[:, -spec.kv_heads :]
    assert torch.equal(values[written], v)
    untouched = torch.ones(len(keys), dtype=torch.bool).index_fill(0, written, False)
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit(
    kernels: Kernels, dtype: torch.dtype, window: int | None
) -> None:
    spec = _spec(dtype, 6, 2, 64, 32, window)
    rows = [_sequence(spec, *lengths) for lengths in RAGGED]
    together = _run(kernels, spec, 16, rows)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(_run(kernels, spec, 16, [row])[0], out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("chunk", [1, 7, 64, 96])
def test_chunks_and_page_sizes_change_no_bit(
    kernels: Kernels, dtype: torch.dtype, window: int | None, chunk: int
) -> None:
    spec = _spec(dtype, 6, 2, 64, 32, window)
    whole = _sequence(spec, 230, 0)
    expected = _run(kernels, spec, 16, [whole])[0]
    pages = Pages(spec, 64 if chunk == 7 else 1, 230)
    table, backend = pages.table(230, 0), CpuAttention(kernels)
    parts: list[Tensor] = []
    for done in range(0, 230, chunk):
        end = min(done + chunk, 230)
        parts += _step(backend, pages, [Sequence(whole.qkv[:end], whole.gates[:end], done)], [table])
    assert torch.equal(torch.cat(parts), expected)


def test_large_scores_stay_finite(kernels: Kernels) -> None:
    spec = replace(_spec(torch.float32, 2, 1, 32, 16, None), scale=50.0)
    row = _sequence(spec, 140, 0)
    out = _run(kernels, spec, 16, [row])[0]
    assert out.isfinite().all()
    assert_close(out, _expected(spec, row), 1e-3)


def test_an_odd_head_size_is_refused(kernels: Kernels) -> None:
    spec = _spec(torch.float32, 2, 1, 15, 8, None)
    with pytest.raises(ValueError, match="head size 15"):
        _run(kernels, spec, 16, [_sequence(spec, 3, 0)])
