"""All chosen experts of a batch in one native call."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from srt.layers.cpu.kernels import CODES, Kernels, MoeCall
from srt.layers.cpu.packing import pack_matrix
from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts
from srt.layers.ops import Choice
from srt.layers.quant.contract import WEIGHT, WeightFormat

PANEL_HALF = 16
"""Gate columns of a packed panel, beside as many up columns."""


class CpuExperts:
    """`ExpertRunner` for float32 and bfloat16. A token's experts are summed in the order of their numbers."""

    width_multiple = 1

    def __init__(self, weights: WeightFormat, kernels: Kernels) -> None:
        self._kernels = kernels
        self.weights = weights
        self._moe = kernels["srt_moe"]

    def refuses(self, shape: ExpertShape) -> str | None:
        if shape.elsewhere:
            return "all experts of a layer must be on this rank"
        grids = self.weights.grids()
        return None if len(grids) == 1 and grids[WEIGHT].dtype in CODES else f"no kernels for {self.weights.name}"

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        gate_up, down = experts.gate_up.weight, experts.down.weight
        assert down.shape == (shape.experts, shape.hidden, shape.width)
        assert gate_up.shape == (shape.experts, 2 * shape.width, shape.hidden)
        order = gate_up_order(shape.experts, shape.width)
        tensors = {
            "gate_up": pack_matrix(self._kernels, gate_up.reshape(-1, shape.hidden), order),
            "down": torch.cat([pack_matrix(self._kernels, one) for one in down.contiguous()]),
        }
        return PackedExperts(shape, tensors)

    def pack_shared(self, shared: StoredExperts, shape: ExpertShape) -> PackedExperts:
        return self.pack(shared, shape)

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        return self._run(hidden, choice, self._call(hidden, choice, experts))

    def run_with_shared(self, hidden: Tensor, choice: Choice, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        call = self._call(hidden, choice, experts)
        call.shared_width = shared.shape.width
        call.shared_limit = math.inf if shared.shape.limit is None else shared.shape.limit
        call.shared_gate_up, call.shared_down = (shared.tensors[key].data_ptr() for key in ("gate_up", "down"))
        return self._run(hidden, choice, call)

    def _call(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> MoeCall:
        shape, gate_up, down = experts.shape, experts.tensors["gate_up"], experts.tensors["down"]
        assert hidden.dtype is gate_up.dtype and hidden.stride(1) == 1
        return MoeCall(
            CODES[hidden.dtype],
            hidden.shape[1],
            shape.experts,
            choice.ids.shape[1],
            shape.width,
            math.inf if shape.limit is None else shape.limit,
            gate_up.data_ptr(),
            down.data_ptr(),
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
