"""All chosen experts of a batch in one native call."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from srt.layers.cpu.kernels import CODES, Kernels, Matrix, MoeCall
from srt.layers.cpu.packing import CODINGS, PANEL_HALF, PLAIN, pack_coded, pack_matrix
from srt.layers.moe.contract import ExpertShape, PackedExperts, Route, StoredExperts
from srt.layers.ops import Choice
from srt.layers.quant.contract import WEIGHT, StoredWeight, WeightFormat


class CpuExperts:
    """`ExpertRunner` for float32, bfloat16, FP8 and NVFP4 weights. A token's experts are summed in the order of their
    numbers.

    Coded weights stay coded in memory and are decoded exactly, a piece at a time; activations are used as they are.
    """

    width_multiple = 1

    def __init__(self, weights: WeightFormat, kernels: Kernels) -> None:
        self._kernels = kernels
        self.weights = weights
        self._coding = CODINGS.get(weights.name, PLAIN)
        self._moe = kernels["srt_moe"]

    def refuses(self, shape: ExpertShape) -> str | None:
        known = self.weights.name in CODINGS or self.weights.grids()[WEIGHT].dtype in CODES
        return None if known else f"no kernels for {self.weights.name}"

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        assert experts.down.shape == (shape.experts, shape.hidden, shape.width)
        assert experts.gate_up.shape == (shape.experts, 2 * shape.width, shape.hidden)
        columns = torch.arange(-(-shape.hidden // (2 * PANEL_HALF)) * 2 * PANEL_HALF, dtype=torch.int32)
        hidden = torch.where(columns < shape.hidden, columns, -1)
        tensors = self._packed("gate_up", experts.gate_up, gate_up_order(shape.width))
        return PackedExperts(shape, tensors | self._packed("down", experts.down, hidden))

    def pack_shared(self, shared: StoredExperts, shape: ExpertShape) -> PackedExperts:
        orders = {"gate_up": gate_up_order(shape.width), "down": None}
        plain = {"gate_up": shared.gate_up.weight[0], "down": shared.down.weight[0]}
        return PackedExperts(shape, {key: pack_matrix(self._kernels, plain[key], orders[key]) for key in plain})

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        return self._run(hidden, choice, self._call(hidden, choice, experts))

    def run_with_shared(self, hidden: Tensor, route: Route, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        choice = route()
        call = self._call(hidden, choice, experts)
        call.shared_width = shared.shape.width
        call.shared_limit = math.inf if shared.shape.limit is None else shared.shape.limit
        call.shared_gate_up, call.shared_down = (shared.tensors[key].data_ptr() for key in ("gate_up", "down"))
        return self._run(hidden, choice, call)

    def _packed(self, name: str, stored: StoredWeight, order: Tensor) -> dict[str, Tensor]:
        """A stack [E, N, K] as panels of its rows in `order`, expert by expert."""
        if self._coding == PLAIN:
            experts, rows, columns = stored.shape
            starts = torch.arange(experts, dtype=torch.int32)[:, None] * rows
            every = torch.where(order >= 0, order + starts, -1).flatten().contiguous()
            return {name: pack_matrix(self._kernels, stored.weight.reshape(-1, columns), every)}
        packed = pack_coded(self._coding, stored, order)
        return {f"{name}{suffix}": tensor for suffix, tensor in packed.items()}

    def _call(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> MoeCall:
        shape, tensors = experts.shape, experts.tensors
        assert hidden.stride(1) == 1 and (self._coding != PLAIN or hidden.dtype is tensors["gate_up"].dtype)
        return MoeCall(
            CODES[hidden.dtype],
            hidden.shape[1],
            shape.experts,
            choice.ids.shape[1],
            shape.width,
            math.inf if shape.limit is None else shape.limit,
            self._matrix("gate_up", shape.hidden, tensors),
            self._matrix("down", shape.width, tensors),
            0,
            math.inf,
            None,
            None,
        )

    def _matrix(self, name: str, columns: int, tensors: dict[str, Tensor]) -> Matrix:
        pointers = (tensors[key].data_ptr() if key in tensors else None for key in (f"{name}.groups", f"{name}.scales"))
        return Matrix(self._coding, columns, tensors[name].data_ptr(), *pointers)

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


def gate_up_order(width: int) -> Tensor:
    """Rows of a merged [2I, H] gate and up as packed columns: 16 of the gate, then the same 16 of up, padded."""
    groups = -(-width // PANEL_HALF)
    columns = torch.arange(groups * PANEL_HALF, dtype=torch.int32).view(groups, 1, PANEL_HALF)
    halves = torch.tensor([0, width], dtype=torch.int32).view(1, 2, 1)
    return torch.where(columns < width, columns + halves, -1).flatten().contiguous()
