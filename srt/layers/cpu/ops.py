"""Norms, activation, routing and arg max in one native call each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srt.layers.cpu.kernels import CODES, Kernels
from srt.layers.cpu.packing import pack_matrix
from srt.layers.ops import Choice


class CpuOps:
    """`Ops` for float32 and bfloat16 on a CPU. The result of a token does not depend on the others in the batch."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._rms_norm = kernels["srt_rms_norm"]
        self._gated_silu = kernels["srt_gated_silu"]
        self._route = kernels["srt_route"]
        self._argmax = kernels["srt_argmax"]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, size = x.shape
        out = torch.empty(rows, size, dtype=x.dtype)
        pointer, code = x.data_ptr(), CODES[x.dtype]
        self._rms_norm(code, pointer, x.stride(0), None, 0, weight.data_ptr(), None, out.data_ptr(), rows, size, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, size = x.shape
        out = torch.empty(2, rows, size, dtype=x.dtype)
        normed, total = out.unbind()
        self._rms_norm(
            CODES[x.dtype],
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            residual.stride(0),
            weight.data_ptr(),
            total.data_ptr(),
            normed.data_ptr(),
            rows,
            size,
            eps,
        )
        return normed, total

    def gated_silu(self, gate_up: Tensor, limit: float | None) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype)
        bound = math.inf if limit is None else limit
        code = CODES[gate_up.dtype]
        self._gated_silu(code, gate_up.data_ptr(), gate_up.stride(0), rows, width, bound, out.data_ptr())
        return out

    def pack_router(self, weight: Tensor) -> Tensor:
        return pack_matrix(self._kernels, weight)

    def route(self, x: Tensor, packed: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        rows, size = x.shape
        ids = torch.empty(rows, top_k, dtype=torch.int32)
        weights = torch.empty(rows, top_k, dtype=torch.float32)
        self._route(
            CODES[x.dtype],
            x.data_ptr(),
            x.stride(0),
            rows,
            size,
            packed.data_ptr(),
            bias.data_ptr(),
            bias.shape[0],
            top_k,
            factor,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return Choice(ids, weights)

    def sample_greedy(self, logits: Tensor) -> Tensor:
        rows, size = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._argmax(CODES[logits.dtype], logits.data_ptr(), logits.stride(0), rows, size, out.data_ptr())
        return out

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.sample_greedy(logits), logits.sum(dim=-1, dtype=torch.float32).isfinite().int()
