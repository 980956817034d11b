"""Paged attention in Triton against the plain reference: in the interpreter, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cuda.attention import FEW_LINES, Sharing, Tiling, TritonAttention
from srt.layers.quant.codes import E4M3

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Absolute and relative; outputs are near one."""


def spec_of(
    dtype: torch.dtype, q_heads: int, kv_heads: int, size: int, rotary: int, window: int | None
) -> AttentionSpec:
    angles = torch.arange(400.0)[:, None] * 0.7 ** torch.arange(rotary // 2)[None]
    return AttentionSpec(
        layer=0, group=1, q_heads=q_heads, kv_heads=kv_heads, head_dim=size, rotary_dim=rotary, window=window,
        scale=size**-0.5, q_norm=random(size, dtype=dtype, scale=0.3), k_norm=random(size, dtype=dtype, scale=0.3),
        rope=torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(DEVICE), eps=1e-5,
        k_scale=torch.tensor(0.02, device=DEVICE), v_scale=torch.tensor(0.03, device=DEVICE),
    )  # fmt: skip


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


@dataclass
class Case:
    """Rows with `done` keys that compute `counts` more; lines of the page table in another order than the rows."""

    done: list[int]
    counts: list[int]
    page_size: int = 16
    rows: bool = True

    def batch(self) -> ForwardBatch:
        pages = [-(-(d + c) // self.page_size) for d, c in zip(self.done, self.counts, strict=True)]
        numbers = (torch.randperm(sum(pages)) + 1).int()
        lines = torch.randperm(len(pages)) if self.rows else torch.arange(len(pages))
        table = torch.zeros(len(pages), max(pages) + 1, dtype=torch.int32)
        for line, own in zip(lines.tolist(), numbers.split(pages), strict=True):
            table[line, : len(own)] = own
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        positions = torch.cat([torch.arange(d, d + c) for d, c in zip(self.done, self.counts, strict=True)])
        token_lines = lines.repeat_interleave(torch.tensor(self.counts))
        slots = table[token_lines, positions // self.page_size].long() * self.page_size + positions % self.page_size
        lens = [d + c for d, c in zip(self.done, self.counts, strict=True)]
        return ForwardBatch(
            input_ids=torch.zeros_like(positions), positions=positions.to(DEVICE),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE), query_starts_list=starts,
            kv_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE), kv_lens_list=None,
            page_tables=(table.to(DEVICE) * 0, table.to(DEVICE)), slots=(slots.to(DEVICE) * 0, slots.to(DEVICE)),
            logit_tokens=torch.zeros(0, dtype=torch.int64), page_size=self.page_size,
            table_rows=lines.to(DEVICE) if self.rows else None,
        )  # fmt: skip


def check(
    case: Case, spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype, tiling: Tiling | None = None,
    sharing: Sharing | None = None,
) -> None:  # fmt: skip
    """Store and attend with both backends over the same pages; what is stored and what is attended must agree."""
    batch = case.batch()
    tokens, total = sum(case.counts), int(batch.page_tables[1].max()) + 1
    shape = total, case.page_size, spec.kv_heads, spec.head_dim
    memory = [random(*shape, dtype=torch.float32).to(kv_dtype) for _ in range(2)]
    ours, theirs = KVLayer(*(m.clone() for m in memory)), KVLayer(*(m.clone() for m in memory))
    if kv_dtype != E4M3:
        spec = replace(spec, k_scale=torch.ones((), device=DEVICE), v_scale=torch.ones((), device=DEVICE))
    width = (spec.q_heads + 2 * spec.kv_heads) * spec.head_dim
    projected = random(tokens, width + spec.q_heads, dtype=dtype, scale=2.0)
    qkv, gates = projected[:, :width], projected[:, width:]
    tolerance = TOLERANCE[dtype]
    found, expected = TritonAttention(tiling=tiling, sharing=sharing or SHARING), ReferenceAttention()
    found.begin(batch)
    expected.begin(batch)
    q, q_expected = found.store(qkv, spec, ours, batch), expected.store(qkv, spec, theirs, batch)
    torch.testing.assert_close(q, q_expected, atol=tolerance, rtol=tolerance)
    wide = 0.13 if kv_dtype == E4M3 else tolerance
    torch.testing.assert_close(ours.k.float(), theirs.k.float(), atol=wide, rtol=wide)
    torch.testing.assert_close(ours.v.float(), theirs.v.float(), atol=wide, rtol=wide)
    out = found.attend(q_expected, gates, spec, theirs, batch)
    truth = expected.attend(q_expected.float(), gates.float(), spec, theirs, batch)
    torch.testing.assert_close(out.float(), truth, atol=tolerance, rtol=tolerance)


DECODES = Case([0, 5, 130, 77], [1, 1, 1, 1])
GUESSES = Case([3, 140], [4, 4], page_size=1)
MIXED = Case([0, 90, 7], [70, 1, 5], page_size=64)
TWELVE = Case([9, 31], [9, 1], page_size=4, rows=False)


SHARING = Sharing(programs=512 if DEVICE.type == "cuda" else 32)
"""The interpreter runs programs one after the other: a GPU that is full with a few."""


@pytest.mark.parametrize(
    ("case", "window", "dtype", "kv_dtype"),
    [
        (DECODES, None, torch.float32, torch.float32),
        (DECODES, 40, torch.bfloat16, torch.bfloat16),
        (DECODES, None, torch.bfloat16, E4M3),
        (GUESSES, 40, torch.float32, torch.float32),
        (GUESSES, None, torch.bfloat16, torch.bfloat16),
        (MIXED, None, torch.float32, torch.float32),
        (MIXED, 1, torch.bfloat16, torch.bfloat16),
        (MIXED, 40, torch.bfloat16, E4M3),
    ],
)
def test_attention_equals_the_reference(
    case: Case, window: int | None, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    check(case, spec_of(dtype, 6, 2, 16, 8, window), dtype, kv_dtype)


LONG = Case([0, 50], [30, 13], page_size=16)
FAR = Case([30], [30], page_size=1)


@pytest.mark.parametrize("masks", ["all", "branch", "split"])
@pytest.mark.parametrize(
    ("case", "window", "tiling"),
    [
        (LONG, None, Tiling(lines=32, keys=16)),
        (LONG, 40, Tiling(lines=32, keys=16, longest_first=False)),
        (LONG, 35, Tiling(lines=64, keys=32, by_page=True)),
        (LONG, 7, Tiling(lines=64, keys=32, by_page=True, ahead=False)),
        (replace(LONG, page_size=64), 40, Tiling(lines=64, keys=16)),
        (FAR, 33, Tiling(lines=64, keys=32, ahead=False)),
    ],
)
def test_no_way_to_cut_prompts_changes_what_is_attended(
    case: Case, window: int | None, tiling: Tiling, masks: Literal["all", "branch", "split"]
) -> None:
    spec = spec_of(torch.float32, 3, 1, 16, 8, window)
    check(case, spec, torch.float32, torch.float32, replace(tiling, masks=masks))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window", [None, 40])
def test_no_way_to_share_keys_out_changes_what_is_attended(window: int | None, page_size: int) -> None:
    case, sharing = Case([0, 90], [1, 1], page_size), Sharing(programs=8, keys=32, ahead=True, stages=3)
    check(case, spec_of(torch.float32, 3, 1, 16, 8, window), torch.float32, torch.float32, sharing=sharing)


def test_twelve_heads_share_a_key_head() -> None:
    assert FEW_LINES < 9 * 12
    check(TWELVE, spec_of(torch.bfloat16, 24, 2, 32, 32, None), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(masks="split", keys=16)])
def test_tokens_of_a_prompt_without_a_position_are_finite_and_spoil_nothing(tiling: Tiling) -> None:
    spec = spec_of(torch.float32, 4, 2, 16, 16, None)
    batch = Case([0], [40]).batch()
    batch = replace(batch, kv_lens=torch.tensor([31], dtype=torch.int32, device=DEVICE))
    kv = KVLayer(*(random(4, 16, 2, 16, dtype=torch.float32) for _ in range(2)))
    backend = TritonAttention(tiling=tiling)
    backend.begin(batch)
    out = backend.attend(random(40, 4, 16, dtype=torch.float32), random(40, 4, dtype=torch.float32), spec, kv, batch)
    assert bool(out.isfinite().all())
    assert not out[:9].any()


def test_tokens_without_a_position_are_finite_and_spoil_nothing() -> None:
    spec = spec_of(torch.float32, 4, 2, 16, 16, None)
    batch = Case([0], [4]).batch()
    batch = replace(batch, kv_lens=torch.tensor([2], dtype=torch.int32, device=DEVICE))
    kv = KVLayer(*(random(2, 16, 2, 16, dtype=torch.float32) for _ in range(2)))
    backend = TritonAttention()
    backend.begin(batch)
    out = backend.attend(random(4, 4, 16, dtype=torch.float32), random(4, 4, dtype=torch.float32), spec, kv, batch)
    assert bool(out.isfinite().all())
    assert not out[:2].any()
