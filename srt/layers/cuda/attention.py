"""Paged attention on a GPU in Triton: any page size, any mix of prompts and decodes in one batch, FP8 KV.

Decodes share their keys out over several programs, as many as the GPU has room for; prompts are cut into tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
import triton
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cuda import attention_kernels as kernels
from srt.layers.cuda import prompt_kernels
from srt.layers.cuda.launch import Launch
from srt.layers.gpu import Gpu, to_device
from srt.layers.quant.codes import E4M3

STORE_HEADS: Final = 16
FEW_LINES: Final = 64
"""Rows with at most so many tokens x query heads a key head take one tile each, cut along the keys."""
MOST_PARTS: Final = 32
WIDE: Final = 256
"""Bytes of a head up to which a tile has room for three blocks of keys and values at once."""


@dataclass(frozen=True)
class Tiling:
    """How prompts are cut. What is computed does not depend on it, except for the order of sums."""

    lines: int = 128
    """Tokens x query heads of a key head in a tile."""
    keys: int = 64
    """Keys in a block."""
    warps: int = 8
    stages: int = 3
    """Blocks of keys under way at once."""
    masks: Literal["all", "branch", "split"] = "branch"
    """Blocks at a tile's edges are masked alone, in the same loop or in loops of their own; or all blocks are."""
    ahead: bool = True
    """Page numbers are fetched a block before they are needed."""
    by_page: bool = False
    """One page number is fetched for all keys of a page, where a block has several pages."""
    longest_first: bool = True
    """Tiles that see most keys begin first."""

    def fitting(self, head_bytes: int) -> Tiling:
        """The same for heads of so many bytes, of which fewer blocks fit at once."""
        return replace(self, stages=min(self.stages, 2)) if head_bytes > WIDE else self


@dataclass(frozen=True)
class Sharing:
    """How the keys of decodes are shared out."""

    programs: int = 512
    """What fills a GPU, about four deep: keys are cut into no more parts than that needs."""
    keys: int = 64
    """Keys in a block."""
    warps: int = 4
    stages: int = 2
    ahead: bool = False
    """Page numbers are fetched a block before they are needed."""

    def parts(self, programs: int, window: int | None) -> int:
        """Into how many parts the keys of each row are cut, where there are `programs` without that: a power of two."""
        most = MOST_PARTS if window is None else max(1, window // self.keys)
        wanted = min(most, self.programs // programs)
        return 1 << max(0, wanted.bit_length() - 1)

    def fitting(self, head_bytes: int) -> Sharing:
        """The same for heads of so many bytes, of which fewer blocks fit at once."""
        return replace(self, stages=min(self.stages, 2)) if head_bytes > WIDE else self


@dataclass(frozen=True)
class _Tiles:
    """Tiles of a ragged batch: row of each, and the first of its tokens."""

    rows: Tensor
    firsts: Tensor


class TritonAttention:
    """`AttentionBackend` for one GPU. Grids follow from the shape of the batch alone, so they may be recorded."""

    def __init__(self, gpu: Gpu | None = None, tiling: Tiling | None = None, sharing: Sharing | None = None) -> None:
        self._launch = Launch(gpu)
        self._tiling = Tiling() if tiling is None else tiling
        self._sharing = Sharing() if sharing is None else sharing
        self._tiles: dict[int, _Tiles] = {}
        self._table_rows = torch.empty(0, dtype=torch.int64)
        self._longest = 1

    def begin(self, batch: ForwardBatch) -> None:
        self._tiles = {}
        self._longest = int(np.diff(batch.query_starts_list).max())
        rows = len(batch.query_starts_list) - 1
        device = batch.positions.device
        self._table_rows = torch.arange(rows, device=device) if batch.table_rows is None else batch.table_rows

    def store(self, qkv: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        tokens, heads = qkv.shape[0], spec.q_heads + 2 * spec.kv_heads
        q = torch.empty(tokens, spec.q_heads, spec.head_dim, dtype=qkv.dtype, device=qkv.device)
        kernels.store_kernel[tokens, triton.cdiv(heads, STORE_HEADS)](
            qkv, qkv.stride(0), batch.positions, batch.slots[spec.group], spec.rope, spec.q_norm, spec.k_norm,
            spec.k_scale, spec.v_scale, q, kv.k, kv.v, spec.eps,
            Q_HEADS=spec.q_heads, KV_HEADS=spec.kv_heads, SIZE=spec.head_dim, ROTARY=spec.rotary_dim,
            CODED=kv.k.dtype == E4M3, HEADS=STORE_HEADS, **self._launch,
        )  # fmt: skip
        return q

    def attend(self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        if self._longest * (spec.q_heads // spec.kv_heads) > FEW_LINES:
            return self._attend_prompts(q, gates, spec, kv, batch)
        return self._attend_decodes(q, gates, spec, kv, batch)

    def _attend_prompts(
        self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch
    ) -> Tensor:
        """Tiles of the rows' tokens; decodes among them have a tile each."""
        tiling, group = self._tiling.fitting(spec.head_dim * q.element_size()), spec.q_heads // spec.kv_heads
        out = torch.empty(q.shape[0], spec.q_heads * spec.head_dim, dtype=q.dtype, device=q.device)
        if tiling.lines < group:
            raise ValueError(f"{group} query heads share a key head; the kernel takes {tiling.lines}")
        tiles, table = self._cut(tiling.lines // group, batch), batch.page_tables[spec.group]
        prompt_kernels.prompt_kernel[spec.kv_heads, len(tiles.rows)](
            q, kv.k, kv.v, gates, gates.stride(0), out, tiles.rows, tiles.firsts, batch.query_starts, batch.kv_lens,
            table, table.stride(0), self._table_rows, spec.k_scale, spec.v_scale, spec.scale,
            Q_HEADS=spec.q_heads, KV_HEADS=spec.kv_heads, SIZE=spec.head_dim, WINDOW=spec.window or 0,
            PAGE=batch.page_size, CODED=kv.k.dtype == E4M3, LINES=tiling.lines, KEYS=tiling.keys,
            BY_PAGE=tiling.by_page, AHEAD=tiling.ahead, MASKS=tiling.masks, num_warps=tiling.warps,
            num_stages=tiling.stages, **self._launch,
        )  # fmt: skip
        return out

    def _attend_decodes(
        self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch
    ) -> Tensor:
        """One tile a row; its keys are shared out among programs."""
        tokens, rows, group = q.shape[0], len(batch.query_starts_list) - 1, spec.q_heads // spec.kv_heads
        out = torch.empty(tokens, spec.q_heads * spec.head_dim, dtype=q.dtype, device=q.device)
        sharing, lines = self._sharing.fitting(spec.head_dim * q.element_size()), self._longest * group
        lines, parts = max(16, triton.next_power_of_2(lines)), sharing.parts(rows * spec.kv_heads, spec.window)
        part_out, part_sums = q, q
        if parts > 1:
            part_out = torch.empty(tokens, spec.q_heads, parts, spec.head_dim, dtype=torch.float32, device=q.device)
            part_sums = torch.empty(tokens, spec.q_heads, parts, 2, dtype=torch.float32, device=q.device)
        table = batch.page_tables[spec.group]
        kernels.attend_kernel[rows, spec.kv_heads, parts](
            q, kv.k, kv.v, gates, gates.stride(0), out, part_out, part_sums, batch.query_starts, batch.kv_lens, table,
            table.stride(0), self._table_rows, spec.k_scale, spec.v_scale, spec.scale,
            Q_HEADS=spec.q_heads, KV_HEADS=spec.kv_heads, SIZE=spec.head_dim, WINDOW=spec.window or 0,
            PAGE=batch.page_size, CODED=kv.k.dtype == E4M3, PARTS=parts, LINES=lines, KEYS=sharing.keys,
            AHEAD=sharing.ahead, num_warps=sharing.warps, num_stages=sharing.stages, **self._launch,
        )  # fmt: skip
        if parts > 1:
            kernels.combine_kernel[tokens, spec.q_heads](
                part_out, part_sums, gates, gates.stride(0), out,
                Q_HEADS=spec.q_heads, SIZE=spec.head_dim, PARTS=parts, num_warps=2, **self._launch,
            )  # fmt: skip
        return out

    def _cut(self, tokens: int, batch: ForwardBatch) -> _Tiles:
        """Tiles of at most `tokens` tokens of one row; made once a step for each size."""
        if tokens not in self._tiles:
            counts = np.diff(batch.query_starts_list)
            tiles = -(-counts // tokens)
            rows = np.repeat(np.arange(len(counts), dtype=np.int32), tiles)
            ends = np.cumsum(tiles)
            firsts = (np.arange(len(rows)) - np.repeat(ends - tiles, tiles)) * tokens
            if self._tiling.longest_first:
                order = np.argsort(-firsts, kind="stable")
                rows, firsts = rows[order], firsts[order]
            both = torch.from_numpy(np.concatenate([rows, firsts.astype(np.int32)]))
            both = to_device(both, batch.positions.device)
            self._tiles[tokens] = _Tiles(*both.split(len(rows)))
        return self._tiles[tokens]
