"""Paged attention in plain torch, one row at a time in float32: the truth for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from srt.layers.attention.contract import AttentionSpec
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.ops import TorchOps
from srt.layers.quant.codes import E4M3, encode_e4m3
from srt.layers.rope import rotate


class ReferenceAttention:
    """Says exactly what is computed; the loop over rows makes it slow for large batches."""

    def begin(self, batch: ForwardBatch) -> None:
        """Nothing to prepare."""

    def store(self, qkv: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.q_heads, spec.kv_heads, spec.kv_heads], dim=1)
        rows = spec.rope[batch.positions]
        ops, eps = TorchOps(), spec.eps
        q = rotate(ops.rms_norm(q, spec.q_norm, eps).float(), rows).to(qkv.dtype)
        k = rotate(ops.rms_norm(k, spec.k_norm, eps).float(), rows).to(qkv.dtype)
        slots = batch.slots[spec.group]
        _write(kv.k.view(-1, spec.kv_heads, spec.head_dim), slots, k, spec.k_scale)
        _write(kv.v.view(-1, spec.kv_heads, spec.head_dim), slots, v, spec.v_scale)
        return q

    def attend(self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        out = torch.empty_like(q)
        starts = batch.query_starts_list
        lens = batch.kv_lens.tolist() if batch.kv_lens_list is None else batch.kv_lens_list
        table = batch.page_tables[spec.group]
        if batch.table_rows is not None:
            table = table[batch.table_rows]
        for row, keys in enumerate(lens):
            start, end = starts[row], starts[row + 1]
            first = max(0, keys - (end - start) - spec.window + 1) if spec.window else 0
            k, v = (_keys(memory, table[row], first, keys, batch.page_size) for memory in (kv.k, kv.v))
            if kv.k.dtype == E4M3:
                k, v = k * spec.k_scale, v * spec.v_scale
            out[start:end] = _attend_row(q[start:end], k, v, first, spec)
        gated = out * gates.sigmoid()[..., None]
        return gated.view(q.shape[0], -1)


def _write(memory: Tensor, slots: Tensor, values: Tensor, scale: Tensor) -> None:
    """Keys or values to their slots, as numbers or as codes, as the memory's dtype asks for."""
    if memory.dtype == E4M3:
        # An index does not write float8 on every device: the bytes travel as bytes.
        memory.view(torch.uint8)[slots] = encode_e4m3(values.float() / scale).view(torch.uint8)
    else:
        memory[slots] = values


def _keys(memory: Tensor, table: Tensor, first: int, end: int, page_size: int) -> Tensor:
    """Positions [first, end) of a row out of its pages: [end - first, Hkv, D] float32."""
    low = first // page_size
    wanted = table[low : -(-end // page_size)].long()
    pages = memory.view(torch.uint8)[wanted].view(E4M3) if memory.dtype == E4M3 else memory[wanted]
    pages = pages.flatten(0, 1)
    return pages[first - low * page_size : end - low * page_size].float()


def _attend_row(q: Tensor, k: Tensor, v: Tensor, first: int, spec: AttentionSpec) -> Tensor:
    """The last tokens of a row over its keys at positions [first, first + N): [C, Hq, D]."""
    queries, keys = q.shape[0], k.shape[0]
    grouped = q.float().view(queries, spec.kv_heads, -1, spec.head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k) * spec.scale
    at = torch.arange(first + keys - queries, first + keys, device=q.device)[:, None]
    distance = at - torch.arange(first, first + keys, device=q.device)[None, :]
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    # A query without a position sees nothing: let it see everything rather than divide by zero.
    hidden &= ~hidden.all(dim=-1, keepdim=True)
    weights = functional.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hgqk,khd->qhgd", weights, v).reshape(queries, spec.q_heads, spec.head_dim).to(q.dtype)
