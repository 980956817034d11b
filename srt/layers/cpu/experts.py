"""All chosen experts of a batch in one native call."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from srt.layers.cpu.kernels import CODES, Kernels, MoeCall
from srt.layers.cpu.packing import pack_matrix
from srt.layers.moe.contract import PackedExperts
from srt.layers.ops import Choice

PANEL_HALF = 16
"""Gate columns of a packed panel, beside as many up columns."""


class CpuExperts:
    """`ExpertRunner` for float32 and bfloat16. A token's experts are summed in the order of their numbers."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._moe = kernels["srt_moe"]

    def pack(self, gate_up: Tensor, down: Tensor) -> PackedExperts:
        experts, hidden, width = down.shape
        assert gate_up.shape == (experts, 2 * width, hidden)
        order = gate_up_order(experts, width)
        return PackedExperts(
            pack_matrix(self._kernels, gate_up.reshape(-1, hidden), order),
            torch.cat([pack_matrix(self._kernels, one) for one in down.contiguous()]),
            experts,
            width,
        )

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts, limit: float | None) -> Tensor:
        return self._run(hidden, choice, self._call(hidden, choice, experts, limit))

    def run_with_shared(
        self,
        hidden: Tensor,
        choice: Choice,
        experts: PackedExperts,
        limit: float | None,
        shared: PackedExperts,
        shared_limit: float | None,
    ) -> Tensor:
        call = self._call(hidden, choice, experts, limit)
        call.shared_width = shared.width
        call.shared_limit = math.inf if shared_limit is None else shared_limit
        call.shared_gate_up, call.shared_down = shared.gate_up.data_ptr(), shared.down.data_ptr()
        return self._run(hidden, choice, call)

    def _call(self, hidden: Tensor, choice: Choice, experts: PackedExperts, limit: float | None) -> MoeCall:
        assert hidden.dtype is experts.gate_up.dtype and hidden.stride(1) == 1
        return MoeCall(
            CODES[hidden.dtype],
            hidden.shape[1],
            experts.experts,
            choice.ids.shape[1],
            experts.width,
            math.inf if limit is None else limit,
            experts.gate_up.data_ptr(),
            experts.down.data_ptr(),
            0,
            math.inf,
            None,
            None,
        )

    def _run(self, hidden: Tensor, choice: Choice, call: MoeCall) -> Tensor:
        tokens, size = hidden.shape
        out = torch.empty(tokens, size, dtype=hidden.dtype)
        self._moe(
            ctypes.byref(call),
            hidden.data_ptr(),
            hidden.stride(0),
            choice.ids.data_ptr(),
            choice.weights.data_ptr(),
            tokens,
            out.data_ptr(),
        )
        return out


def gate_up_order(experts: int, width: int) -> Tensor:
    """Rows of a stacked [E * 2I, H] gate and up as packed columns: 16 of the gate, then the same 16 of up, padded."""
    groups = -(-width // PANEL_HALF)
    columns = torch.arange(groups * PANEL_HALF, dtype=torch.int32).view(groups, 1, PANEL_HALF)
    halves = torch.tensor([0, width], dtype=torch.int32).view(1, 2, 1)
    one = torch.where(columns < width, columns + halves, -1).flatten()
    starts = torch.arange(experts, dtype=torch.int32)[:, None] * (2 * width)
    return torch.where(one >= 0, one + starts, -1).flatten().contiguous()
