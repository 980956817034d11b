"""Native attention over KV memory in FP8: the reference's codes, and attention over what they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cpu.attention import CpuAttention
from srt.layers.cpu.kernels import Kernels
from srt.layers.quant.codes import E4M3, encode_e4m3
from tests.layers.cpu.support import DTYPES, assert_close, random
from tests.layers.cpu.test_attention import GEOMETRIES, _spec

PAGE = 16
SCALES = [(1.0, 1.0), (0.013, 0.07)]


def coded_spec(
    dtype: torch.dtype, geometry: tuple[int, int, int, int], window: int | None, scales: tuple[float, float]
) -> AttentionSpec:
    spec = _spec(dtype, *geometry, window)
    return replace(spec, k_scale=torch.tensor(scales[0]), v_scale=torch.tensor(scales[1]))


def memory(spec: AttentionSpec, tokens: int) -> KVLayer:
    """Zeroed codes for one row whose pages follow each other from page 1."""
    shape = (-(-tokens // PAGE) + 1, PAGE, spec.kv_heads, spec.head_dim)
    return KVLayer(torch.zeros(shape, dtype=E4M3), torch.zeros(shape, dtype=E4M3))


def batch(done: int, end: int) -> ForwardBatch:
    """Tokens [done, end) of one row."""
    positions = torch.arange(done, end)
    pages = torch.arange(1, -(-end // PAGE) + 1, dtype=torch.int32)[None]
    return ForwardBatch(
        input_ids=positions, positions=positions, query_starts=torch.tensor([0, end - done], dtype=torch.int32),
        query_starts_list=[0, end - done], kv_lens=torch.tensor([end], dtype=torch.int32), kv_lens_list=[end],
        page_tables=(pages,), slots=(positions + PAGE,), logit_tokens=positions[-1:], page_size=PAGE,
    )  # fmt: skip


def run(
    backend: CpuAttention | ReferenceAttention, spec: AttentionSpec, kv: KVLayer, qkv: Tensor, gates: Tensor, done: int
) -> Tensor:
    step = batch(done, done + len(qkv))
    backend.begin(step)
    q = backend.store(qkv, spec, kv, step)
    return backend.attend(q, gates, spec, kv, step)


@pytest.mark.parametrize("library", ["kernels", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_get_the_nearest_code_ties_to_even_saturated(
    request: pytest.FixtureRequest, library: str, dtype: torch.dtype
) -> None:
    """Every code's number, every midpoint between two of them, and what lies close to it on either side."""
    native: Kernels = request.getfixturevalue(library)
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    close = torch.cat([middles * (1 + 1e-6), middles * (1 - 1e-6)])
    wanted = torch.cat([numbers, middles, close, torch.tensor([449.0, 1e9, 1e-12, torch.inf])])
    wanted = torch.cat([wanted, -wanted, torch.tensor([torch.nan])]).to(dtype)
    head = -(-len(wanted) // 8) * 2
    wanted = torch.cat([wanted, wanted.new_zeros(4 * head - len(wanted))])
    spec = coded_spec(dtype, (1, 1, head, 2), None, (1.0, 1.0))
    kv, qkv = memory(spec, 4), random(4, 3 * head, dtype=dtype)
    qkv[:, 2 * head :] = wanted.view(4, head)
    backend = CpuAttention(native)
    backend.begin(step := batch(0, 4))
    backend.store(qkv, spec, kv, step)
    stored = kv.v.view(torch.uint8)[1].flatten()[: 4 * head]
    expected = encode_e4m3(wanted.float()).view(torch.uint8)
    not_numbers = wanted.isnan()
    assert torch.equal(stored[~not_numbers], expected[~not_numbers])
    assert (stored[not_numbers] & 0x7F == 0x7F).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
def test_stored_codes_are_the_references(kernels: Kernels, dtype: torch.dtype, scales: tuple[float, float]) -> None:
    spec = coded_spec(dtype, (6, 2, 48, 20), None, scales)
    qkv, gates = random(50, 10 * 48, dtype=dtype, scale=2.0), random(50, 6, dtype=dtype)
    ours, theirs = memory(spec, 50), memory(spec, 50)
    run(CpuAttention(kernels), spec, ours, qkv, gates, 0)
    run(ReferenceAttention(), spec, theirs, qkv, gates, 0)
    assert torch.equal(ours.v.view(torch.uint8), theirs.v.view(torch.uint8))
    differing = (ours.k.view(torch.uint8) != theirs.k.view(torch.uint8)).float().mean().item()
    assert differing < 0.01, "keys differ where norm and rotation end on the other side of a midpoint only"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_attention_reads_the_numbers_that_the_codes_stand_for(
    kernels: Kernels,
    dtype: torch.dtype,
    window: int | None,
    scales: tuple[float, float],
    geometry: tuple[int, int, int, int],
) -> None:
    spec = coded_spec(dtype, geometry, window, scales)
    width = (spec.q_heads + 2 * spec.kv_heads) * spec.head_dim
    qkv, gates = random(150, width, dtype=dtype, scale=2.0), random(150, spec.q_heads, dtype=dtype)
    kv, backend, step = memory(spec, 150), CpuAttention(kernels), batch(0, 150)
    backend.begin(step)
    q = backend.store(qkv, spec, kv, step)
    found = backend.attend(q, gates, spec, kv, step)
    # The same codes, read by the reference in float32: storing is another test's matter.
    assert_close(found, ReferenceAttention().attend(q.float(), gates.float(), spec, kv, step).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 96])
def test_chunks_change_no_bit(kernels: Kernels, dtype: torch.dtype, chunk: int) -> None:
    spec = coded_spec(dtype, (6, 2, 64, 32), 100, SCALES[1])
    qkv, gates = random(130, 10 * 64, dtype=dtype, scale=2.0), random(130, 6, dtype=dtype)
    whole = run(CpuAttention(kernels), spec, memory(spec, 130), qkv, gates, 0)
    kv, backend = memory(spec, 130), CpuAttention(kernels)
    parts = [run(backend, spec, kv, qkv[at : at + chunk], gates[at : at + chunk], at) for at in range(0, 130, chunk)]
    assert torch.equal(torch.cat(parts), whole)
