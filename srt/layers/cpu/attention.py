"""Paged attention on a CPU: one native call to store, one to attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cpu.kernels import CODES, KV_CODES, AttendBatch, AttendCall, Kernels, StoreCall


@dataclass(frozen=True)
class _Layer:
    """A layer's fixed arguments; `spec` and `kv` keep the memory that they point to."""

    spec: AttentionSpec
    kv: KVLayer
    store: StoreCall
    attend: AttendCall


class CpuAttention:
    """`AttentionBackend` for float32 and bfloat16, and KV memory of the same dtype or of e4m3 codes.

    A token's result depends on its own keys only, bit for bit: not on the chunk that it was computed in, on the page
    size or on other rows.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._store, self._attend = kernels["srt_store"], kernels["srt_attend"]
        self._layers: dict[int, _Layer] = {}
        self._groups: list[AttendBatch] = []
        self._positions = 0

    def begin(self, batch: ForwardBatch) -> None:
        assert batch.table_rows is None, "the kernels take the page tables of the batch's rows"
        self._groups = [_group(batch, table) for table in batch.page_tables]
        self._positions = batch.positions.data_ptr()

    def store(self, qkv: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        tokens = qkv.shape[0]
        q = torch.empty(tokens, spec.q_heads, spec.head_dim, dtype=qkv.dtype)
        self._store(
            self._layer(spec, kv).store,
            qkv.data_ptr(),
            qkv.stride(0),
            tokens,
            self._positions,
            batch.slots[spec.group].data_ptr(),
            q.data_ptr(),
        )
        return q

    def attend(self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        out = torch.empty(q.shape[0], spec.q_heads * spec.head_dim, dtype=q.dtype)
        call, group = self._layer(spec, kv).attend, self._groups[spec.group]
        self._attend(call, group, q.data_ptr(), gates.data_ptr(), gates.stride(0), out.data_ptr())
        return out

    def _layer(self, spec: AttentionSpec, kv: KVLayer) -> _Layer:
        layer = self._layers.get(spec.layer)
        if layer is None or layer.spec is not spec or layer.kv is not kv:
            layer = _bind(spec, kv)
            self._layers[spec.layer] = layer
        return layer


def _group(batch: ForwardBatch, table: Tensor) -> AttendBatch:
    starts, lens = batch.query_starts, batch.kv_lens
    return AttendBatch(table.data_ptr(), table.stride(0), starts.data_ptr(), lens.data_ptr(), lens.shape[0])


def _bind(spec: AttentionSpec, kv: KVLayer) -> _Layer:
    """Check once what the kernels take for granted.

    Raises: ValueError for a head size that does not come in whole 32-bit words.
    """
    dtype, page_size = spec.q_norm.dtype, kv.k.shape[1]
    if spec.head_dim % 2 or spec.rotary_dim % 2:
        raise ValueError(f"head size {spec.head_dim} and its rotated part {spec.rotary_dim} must be even")
    assert kv.k.is_contiguous() and kv.v.is_contiguous() and spec.rope.is_contiguous()
    assert spec.k_norm.dtype is dtype and spec.rope.dtype is torch.float32
    assert kv.k.dtype is kv.v.dtype and kv.k.dtype in (dtype, torch.float8_e4m3fn)
    codes = CODES[dtype], KV_CODES[kv.k.dtype]
    shape = spec.q_heads, spec.kv_heads, spec.head_dim
    memory = kv.k.data_ptr(), kv.v.data_ptr(), spec.k_scale.data_ptr(), spec.v_scale.data_ptr()
    weights = spec.q_norm.data_ptr(), spec.k_norm.data_ptr(), spec.rope.data_ptr()
    store = StoreCall(*codes, *shape, spec.rotary_dim, spec.eps, *weights, *memory)
    attend = AttendCall(*codes, *shape, spec.window or 0, spec.scale, page_size, *memory)
    return _Layer(spec, kv, store, attend)
