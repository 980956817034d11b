"""Routed experts on a GPU through Triton: plain, FP8 block (W8A8) and NVFP4 (W4A16) weights, any clamp.

No step waits for the GPU: which program computes what lies in tables that the GPU makes itself, and grids are as
large as the worst routing needs, so that the whole may be recorded in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from srt.layers.gpu import Gpu
from srt.layers.moe import triton_kernels as kernels
from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts
from srt.layers.moe.shared import PlainShared
from srt.layers.ops import Choice
from srt.layers.quant.codes import E4M3
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import BLOCK, BLOCK_SCALE
from srt.layers.quant.nvfp4 import GROUP_SCALE, MATRIX_SCALE

KINDS: Final = {"bf16": 0, "fp16": 0, "fp32": 0, "fp8": 1, "nvfp4": 2, "nvfp4-a16": 2}
"""`KIND` of the kernels by weight format."""
FP8, NVFP4 = 1, 2
INTERLEAVE: Final = 64
"""Columns of NVFP4 weights that a step of the kernel takes: half of them in low nibbles, half in high ones."""
FIRST_FP8: Final = (8, 9)
"""Least compute capability that has e4m3."""
COMBINE_COLUMNS: Final = 1024
ENCODE_ROWS: Final = 8


@dataclass(frozen=True)
class Schedule:
    """Which pairs (token, expert) each block of programs computes. A pair's number is token * K + its place."""

    order: Tensor
    """Pairs sorted by expert, [T * K] int32; those of experts elsewhere at the end."""
    starts: Tensor
    """Where an expert's pairs begin in `order`, [E + 1] int32."""
    block_expert: Tensor
    """Expert of each block of `rows` pairs, E for a block that has nothing to do, [B] int32."""
    block_row: Tensor
    """Where the block's pairs begin in `order`, [B] int32."""
    rows: int


def schedule(ids: Tensor, experts: int, rows: int) -> Schedule:
    """Blocks of at most `rows` pairs of one expert, made without asking the device for a number.

    Shapes: ids [T, K] int32, of which `experts` stands for an expert elsewhere.
    """
    flat, device = ids.flatten(), ids.device
    ordered, order = torch.sort(flat, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(experts + 1, device=device, dtype=ids.dtype))
    blocks = (starts.diff() + rows - 1) // rows
    ends = blocks.cumsum(0)
    most = min(flat.numel(), flat.numel() // rows + min(experts, flat.numel()))
    numbers = torch.arange(most, device=device)
    expert = torch.searchsorted(ends, numbers, right=True)
    known = expert.clamp(max=experts - 1)
    row = starts[known] + (numbers - (ends - blocks)[known]) * rows
    return Schedule(order.int(), starts.int(), expert.int(), row.int(), rows)


class TritonExperts(PlainShared):
    """`ExpertRunner` for one GPU. Rounds where the reference does: an expert's output, and once at the end.

    FP8 activations are encoded per token and 128 columns; NVFP4 activations stay as they are.
    """

    def __init__(self, weights: WeightFormat, gpu: Gpu | None) -> None:
        self.weights = weights
        self._gpu = gpu
        self._kind = KINDS[weights.name]
        self.width_multiple = INTERLEAVE if self._kind == NVFP4 else 1

    def refuses(self, shape: ExpertShape) -> str | None:
        if self._gpu is None:
            return "needs a GPU"
        if self._kind and self._gpu.capability < FIRST_FP8:
            return f"{self.weights.name} weights need SM89 or newer, this is {self._gpu.text}"
        multiple = {0: 1, FP8: BLOCK, NVFP4: INTERLEAVE}[self._kind]
        if shape.hidden % multiple:
            return f"a hidden size of {shape.hidden} does not divide by {multiple}"
        return None

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        tensors = self._packed("gate_up", experts.gate_up) | self._packed("down", experts.down)
        return PackedExperts(shape, tensors)

    def _packed(self, name: str, stored: StoredWeight) -> dict[str, Tensor]:
        """A weight as the kernels read it: `NAME.weight`, `.scale` and `.matrix`, the latter two empty if unused."""
        tensors, none = stored.tensors, torch.empty(0, device=stored.weight.device)
        if self._kind == NVFP4:
            weight = interleave(stored.weight)
            return {
                f"{name}.weight": weight,
                f"{name}.scale": tensors[GROUP_SCALE].contiguous(),
                f"{name}.matrix": tensors[MATRIX_SCALE].contiguous(),
            }
        scale = tensors[BLOCK_SCALE].contiguous() if self._kind == FP8 else none
        return {f"{name}.weight": stored.weight.contiguous(), f"{name}.scale": scale, f"{name}.matrix": none}

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        return self._combine(self._pairs(hidden, choice, experts), choice, experts.shape, None)

    def run_with_shared(self, hidden: Tensor, choice: Choice, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        pairs = self._pairs(hidden, choice, experts)
        return self._combine(pairs, choice, experts.shape, self.run_shared(hidden, shared))

    def _pairs(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        """Every chosen expert's output: [T, H] -> [T * K, H]; rows of experts elsewhere are not written."""
        shape, packed = experts.shape, experts.tensors
        tokens, top_k = choice.ids.shape
        pairs = torch.empty(tokens * top_k, shape.hidden, dtype=hidden.dtype, device=hidden.device)
        if not tokens:
            return pairs
        plan = schedule(choice.ids, shape.experts, block_rows(tokens * top_k, shape.experts))
        table = (plan.order, plan.starts, plan.block_expert, plan.block_row)
        blocks = plan.block_expert.numel()
        columns, step = 64, 64
        inner = torch.empty(tokens * top_k, shape.width, dtype=hidden.dtype, device=hidden.device)
        x, x_scale = self._operand(hidden)
        weight, scale, matrix = (packed[f"gate_up.{key}"] for key in ("weight", "scale", "matrix"))
        kernels.gate_up_kernel[-(-shape.width // columns), blocks](
            x, x_scale, x.stride(0), weight, scale, matrix, inner, *table, shape.limit or 0.0,
            EXPERTS=shape.experts, K=shape.hidden, WIDTH=shape.width, TOP_K=top_k, CLAMP=shape.limit is not None,
            KIND=self._kind, ROWS=plan.rows, COLUMNS=columns, STEP=step,
        )  # fmt: skip
        x, x_scale = self._operand(inner)
        weight, scale, matrix = (packed[f"down.{key}"] for key in ("weight", "scale", "matrix"))
        kernels.down_kernel[-(-shape.hidden // columns), blocks](
            x, x_scale, weight, scale, matrix, pairs, *table,
            EXPERTS=shape.experts, WIDTH=shape.width, HIDDEN=shape.hidden,
            KIND=self._kind, ROWS=plan.rows, COLUMNS=columns, STEP=step,
        )  # fmt: skip
        return pairs

    def _operand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations as the products take them: encoded for FP8, else as they are."""
        return encode(x) if self._kind == FP8 else (x, x)

    def _combine(self, pairs: Tensor, choice: Choice, shape: ExpertShape, shared: Tensor | None) -> Tensor:
        tokens, top_k = choice.ids.shape
        out = torch.empty(tokens, shape.hidden, dtype=pairs.dtype, device=pairs.device)
        if tokens:
            kernels.combine_kernel[tokens, -(-shape.hidden // COMBINE_COLUMNS)](
                pairs, choice.ids, choice.weights, out if shared is None else shared, out,
                EXPERTS=shape.experts, HIDDEN=shape.hidden, TOP_K=top_k, SHARED=shared is not None,
                COLUMNS=COMBINE_COLUMNS,
            )  # fmt: skip
        return out


def block_rows(pairs: int, experts: int) -> int:
    """Pairs that a program computes at once: a power of two near an expert's share, within what registers hold."""
    share = pairs // experts
    return 16 if share <= 16 else 32 if share <= 32 else 64


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """`srt.layers.quant.fp8.encode_tokens` in one kernel, for a K that divides by 128."""
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, width // BLOCK, dtype=torch.float32, device=x.device)
    kernels.encode_kernel[-(-rows // ENCODE_ROWS), width // BLOCK](
        x, x.stride(0), codes, scales, rows, K=width, ROWS=ENCODE_ROWS
    )
    return codes, scales


def interleave(packed: Tensor) -> Tensor:
    """NVFP4 bytes [.., K / 2] regrouped: in every 64 columns, byte j holds columns j (low) and 32 + j (high)."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).unflatten(-2, (-1, INTERLEAVE // 2)).flatten(-2)
    low, high = codes.split(INTERLEAVE // 2, dim=-1)
    joined: Tensor = low | (high << 4)
    return joined.flatten(-2)
