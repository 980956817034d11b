"""Norms, activation, routing and arg max on a GPU, one or two Triton kernels each."""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from srt.layers.cuda import router_kernels
from srt.layers.cuda import small_kernels as kernels
from srt.layers.cuda.arrivals import Counter
from srt.layers.cuda.launch import Launch
from srt.layers.gpu import Gpu
from srt.layers.ops import Choice

ACTIVATION_COLUMNS: Final = 1024
LOGIT_COLUMNS: Final = 4096
ROUTER_PROGRAMS: Final = 288
"""Of a router's products: with few tokens they are shared out along K too, or most of the GPU would look on."""
MOST_SHARES: Final = 8
ROUTER_STEP: Final = 128
FEW_TOKENS: Final = 4
"""Up to so many are routed in one kernel."""
FEW_COLUMNS: Final = 2
"""Experts of each of its programs, with all of K in registers up to `MOST_COLUMNS`."""
MOST_COLUMNS: Final = 8192
WARP: Final = 32
"""Threads of a warp."""


class TritonOps:
    """`Ops` for float32, bfloat16 and float16 on a GPU. Nothing here waits for it."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self._launch = Launch(gpu)
        self._arrived = Counter()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, size = x.shape
        out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
        total = out if residual is None else torch.empty_like(out)
        other = x if residual is None else residual
        if rows:
            block = triton.next_power_of_2(size)
            kernels.norm_kernel[rows,](
                x, x.stride(0), other, other.stride(0), weight, total, out, eps,
                SIZE=size, BLOCK=block, ADD=residual is not None, num_warps=max(1, min(16, block // 512)),
                **self._launch,
            )  # fmt: skip
        return out, total

    def gated_silu(self, gate_up: Tensor, limit: float | None) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        if rows:
            kernels.gated_silu_kernel[rows, triton.cdiv(width, ACTIVATION_COLUMNS)](
                gate_up, gate_up.stride(0), out, limit or 0.0,
                WIDTH=width, CLAMP=limit is not None, BLOCK=ACTIVATION_COLUMNS, **self._launch,
            )  # fmt: skip
        return out

    def pack_router(self, weight: Tensor) -> Tensor:
        return weight.contiguous()

    def route(self, x: Tensor, packed: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        (tokens, size), experts = x.shape, packed.shape[0]
        ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
        weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
        if not tokens:
            return Choice(ids, weights)
        lanes = max(WARP, triton.next_power_of_2(top_k))
        if tokens <= FEW_TOKENS and size <= MOST_COLUMNS:
            logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
            router_kernels.route_few_kernel[triton.cdiv(experts, FEW_COLUMNS),](
                x, x.stride(0), packed, bias, logits, self._arrived.on(x.device), ids, weights, tokens, factor,
                SIZE=size, PADDED=triton.next_power_of_2(size), EXPERTS=experts, COLUMNS=FEW_COLUMNS,
                COUNT=triton.next_power_of_2(tokens), TOP_K=top_k, LANES=lanes, num_warps=8, **self._launch,
            )  # fmt: skip
            return Choice(ids, weights)
        rows, columns = (max(16, min(64, triton.next_power_of_2(tokens))), 16 if tokens <= 64 else 32)
        blocks = triton.cdiv(tokens, rows) * triton.cdiv(experts, columns)
        shares = max(1, min(MOST_SHARES, ROUTER_PROGRAMS // blocks, triton.cdiv(size, ROUTER_STEP)))
        shares = 1 << (shares.bit_length() - 1)  # each number is compiled for
        share = triton.cdiv(triton.cdiv(size, shares), ROUTER_STEP) * ROUTER_STEP
        partial = torch.empty(shares, tokens, experts, dtype=torch.float32, device=x.device)
        router_kernels.router_logits_kernel[triton.cdiv(tokens, rows), triton.cdiv(experts, columns), shares](
            x, x.stride(0), packed, partial, tokens,
            SIZE=size, EXPERTS=experts, SHARE=share, ROWS=rows, COLUMNS=columns, STEP=ROUTER_STEP, **self._launch,
        )  # fmt: skip
        router_kernels.choose_kernel[tokens,](
            partial, bias, ids, weights, tokens, factor,
            EXPERTS=experts, SHARES=shares, TOP_K=top_k, LANES=lanes, num_warps=1, **self._launch,
        )  # fmt: skip
        return Choice(ids, weights)

    def sample_greedy(self, logits: Tensor) -> Tensor:
        return self.largest(logits)[0]

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, size = logits.shape
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        finite = torch.empty(rows, dtype=torch.int32, device=logits.device)
        if rows:
            blocks = triton.cdiv(size, LOGIT_COLUMNS)
            values = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
            places = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
            kernels.block_max_kernel[rows, blocks](
                logits, logits.stride(0), values, places, SIZE=size, BLOCK=LOGIT_COLUMNS, num_warps=8, **self._launch
            )
            kernels.row_max_kernel[rows,](
                values,
                places,
                out,
                finite,
                COUNT=blocks,
                BLOCK=triton.next_power_of_2(blocks),
                num_warps=1,
                **self._launch,
            )
        return out, finite
