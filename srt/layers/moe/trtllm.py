"""Routed experts through FlashInfer's TRT-LLM-Gen kernels, on the SM100 family.

The router has chosen and weighed already, so the routed entry points are called: their own routing would round weights
to bfloat16, and a scaling factor passed to them would be applied a second time. Weights are laid out once.
The clamp is FlashInfer's SwigluStep, which clamps after silu as the model does; where a format lacks it, the layer is
refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from srt.layers.gpu import Gpu
from srt.layers.moe.contract import ExpertShape, PackedExperts, Route, StoredExperts
from srt.layers.moe.shared import PlainShared
from srt.layers.moe.trtllm_layout import (
    block_major,
    gated_rows,
    interleave_scales,
    rows_of,
    shuffled_rows,
    up_first,
)
from srt.layers.ops import Choice
from srt.layers.quant.codes import encode_e4m3
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import BLOCK_SCALE
from srt.layers.quant.nvfp4 import GROUP_SCALE, INPUT_SCALE, MATRIX_SCALE

log = logging.getLogger(__name__)

FAMILY: Final = 10
"""Major compute capability of the only GPUs with these kernels."""
WIDTHS: Final = {"bf16": 128, "fp8": 128, "nvfp4": 64}
"""The width of a rank is a multiple of this, by weight format. NVFP4: 2I rows make whole tiles of 128."""
HIDDEN: Final = 256
RENORMALIZE: Final = 1
"""A routing method for an argument that must be one; nothing is routed."""


@dataclass(frozen=True)
class TrtllmKernels:
    """What is called of FlashInfer 0.7.2, and two encoders of activations."""

    bf16: Callable[..., Any]
    """`trtllm_bf16_routed_moe`."""
    fp8: Callable[..., Any]
    """`trtllm_fp8_block_scale_routed_moe`."""
    fp4: Callable[..., Any]
    """`trtllm_fp4_block_scale_routed_moe`."""
    encode_fp8: Callable[[Tensor], tuple[Tensor, Tensor]]
    """[T, K] -> e4m3 codes [T, K] and multipliers [T, K / 128]."""
    encode_fp4: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """[T, K] and 1 / input scale [1] -> packed codes [T, K / 2] and group scales, e4m3 or bytes, T * K / 16 of them."""
    swiglu: int
    swiglu_step: int
    linear_scales: Any
    """The value of `SfLayout` for row-major scales of activations."""


class TrtllmExperts(PlainShared):
    """`ExpertRunner` for bfloat16, FP8 block (W8A8) and NVFP4 (W4A4) weights."""

    def __init__(self, weights: WeightFormat, gpu: Gpu | None, kernels: TrtllmKernels) -> None:
        self.weights = weights
        self._gpu, self._kernels = gpu, kernels
        self.width_multiple = WIDTHS.get(weights.name, 1)

    def refuses(self, shape: ExpertShape) -> str | None:
        if self._gpu is None or self._gpu.capability[0] != FAMILY:
            return f"needs a GPU of the SM100 family, this is {self._gpu.text if self._gpu else 'none'}"
        name = self.weights.name
        if name not in WIDTHS:
            return f"no kernels for {name} weights, only for {', '.join(WIDTHS)}"
        if shape.hidden % HIDDEN:
            return f"a hidden size of {shape.hidden} does not divide by {HIDDEN}"
        if name == "fp8" and shape.limit is not None:
            return f"FP8 blocks have no activation that clamps after silu (limit {shape.limit:g})"
        return None

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        match self.weights.name:
            case "fp8":
                tensors = _pack_fp8(experts)
            case "nvfp4":
                tensors = _pack_fp4(experts, shape)
            case _:
                tensors = _pack_bf16(experts, shape)
        return PackedExperts(shape, tensors)

    def run_with_shared(self, hidden: Tensor, route: Route, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        return self.run(hidden, route(), experts) + self.run_shared(hidden, shared)

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        shape = experts.shape
        if not hidden.shape[0]:
            return hidden
        activation = self._kernels.swiglu if shape.limit is None else self._kernels.swiglu_step
        common = _routing(choice, shape) | {"activation_type": activation}
        match self.weights.name:
            case "fp8":
                result = self._run_fp8(hidden, experts.tensors, common)
            case "nvfp4":
                result = self._run_fp4(hidden, experts.tensors, common)
            case _:
                result = self._run_bf16(hidden, experts.tensors, common)
        # A tensor in 0.7, announced to become a list of one in 0.8.
        output: Tensor = result if isinstance(result, Tensor) else result[0]
        return output.to(hidden.dtype)

    def _run_bf16(self, hidden: Tensor, packed: dict[str, Tensor], common: dict[str, Any]) -> Any:
        return self._kernels.bf16(
            hidden_states=hidden.contiguous(),
            gemm1_weights=packed["gate_up"],
            gemm2_weights=packed["down"],
            gemm1_clamp_limit=packed.get("clamp"),
            **common,
        )

    def _run_fp8(self, hidden: Tensor, packed: dict[str, Tensor], common: dict[str, Any]) -> Any:
        codes, scale = self._kernels.encode_fp8(hidden)
        return self._kernels.fp8(
            routing_bias=None,
            hidden_states=codes,
            hidden_states_scale=scale.T.contiguous(),
            gemm1_weights=packed["gate_up"],
            gemm1_weights_scale=packed["gate_up.scale"],
            gemm2_weights=packed["down"],
            gemm2_weights_scale=packed["down.scale"],
            **common,
        )

    def _run_fp4(self, hidden: Tensor, packed: dict[str, Tensor], common: dict[str, Any]) -> Any:
        codes, scale = self._kernels.encode_fp4(hidden, packed["factor"])
        return self._kernels.fp4(
            routing_bias=None,
            hidden_states=codes,
            hidden_states_scale=scale.view(torch.float8_e4m3fn).reshape(hidden.shape[0], -1),
            hidden_states_scale_layout=self._kernels.linear_scales,
            gemm1_weights=packed["gate_up"],
            gemm1_weights_scale=packed["gate_up.scale"],
            gemm1_bias=None,
            gemm1_alpha=None,
            gemm1_beta=None,
            gemm1_clamp_limit=packed.get("clamp"),
            gemm2_weights=packed["down"],
            gemm2_weights_scale=packed["down.scale"],
            gemm2_bias=None,
            output1_scale_scalar=packed["up_factor"],
            output1_scale_gate_scalar=packed["gate_factor"],
            output2_scale_scalar=packed["down_factor"],
            **common,
        )


def _routing(choice: Choice, shape: ExpertShape) -> dict[str, Any]:
    """The arguments that say who computes what. An expert elsewhere has a number beyond the local ones."""
    beyond = 4 - shape.experts % 4 if shape.elsewhere else 0
    return {
        "topk_ids": (choice.ids, choice.weights),
        "num_experts": max(shape.experts + beyond, choice.ids.shape[1]),
        "top_k": choice.ids.shape[1],
        "n_group": None,
        "topk_group": None,
        "intermediate_size": shape.width,
        "local_expert_offset": 0,
        "local_num_experts": shape.experts,
        "routed_scaling_factor": None,
        "routing_method_type": RENORMALIZE,
    }


def _pack_bf16(experts: StoredExperts, shape: ExpertShape) -> dict[str, Tensor]:
    gate_up = rows_of(experts.gate_up.weight, gated_rows(shape.width))
    down = rows_of(experts.down.weight, shuffled_rows(shape.hidden))
    packed = {"gate_up": block_major(gate_up), "down": block_major(down)}
    if shape.limit is not None:
        packed["clamp"] = torch.full((shape.experts,), shape.limit, device=down.device)
    return packed


def _pack_fp8(experts: StoredExperts) -> dict[str, Tensor]:
    """Rows stay in order; only the halves change places, and the scales of their blocks with them."""
    return {
        "gate_up": up_first(experts.gate_up.weight),
        "gate_up.scale": up_first(experts.gate_up.tensors[BLOCK_SCALE]),
        "down": experts.down.weight.contiguous(),
        "down.scale": experts.down.tensors[BLOCK_SCALE].contiguous(),
    }


def _pack_fp4(experts: StoredExperts, shape: ExpertShape) -> dict[str, Tensor]:
    """Weights, scales and the scalars between the products.

    The first product's sums stand for numbers divided by input scale * matrix scale. The clamp is applied to the sums
    of both halves with one limit, so where there is a clamp the halves must have one matrix scale.
    """
    gate_up = experts.gate_up if shape.limit is None else _one_matrix_scale(experts.gate_up)
    first, second = gate_up.tensors[INPUT_SCALE].max(), experts.down.tensors[INPUT_SCALE].max()
    gate, up = (first * gate_up.tensors[MATRIX_SCALE]).unbind(-1)
    rows, down_rows = gated_rows(shape.width), shuffled_rows(shape.hidden)
    packed = {
        "gate_up": rows_of(gate_up.weight, rows),
        "gate_up.scale": interleave_scales(rows_of(gate_up.tensors[GROUP_SCALE], rows)),
        "down": rows_of(experts.down.weight, down_rows),
        "down.scale": interleave_scales(rows_of(experts.down.tensors[GROUP_SCALE], down_rows)),
        "factor": (1.0 / first).reshape(1),
        "gate_factor": gate.contiguous(),
        "up_factor": (up / second).contiguous(),
        "down_factor": (second * experts.down.tensors[MATRIX_SCALE][..., 0]).contiguous(),
    }
    if shape.limit is not None:
        packed["clamp"] = shape.limit / packed["gate_factor"]
    return packed


def _one_matrix_scale(gate_up: StoredWeight) -> StoredWeight:
    """Both halves under the larger of their matrix scales; the other half's group scales are rounded anew."""
    scale = gate_up.tensors[MATRIX_SCALE]
    largest = scale.amax(dim=-1, keepdim=True).expand_as(scale)
    if torch.equal(scale, largest):
        return gate_up
    group = gate_up.tensors[GROUP_SCALE].float()
    exact = group * (scale / largest).repeat_interleave(group.shape[1] // 2, dim=1)[..., None]
    rounded = encode_e4m3(exact)
    error = float((rounded.float() - exact).norm() / exact.norm())
    log.warning(
        "gate and up of %d experts have different matrix scales, which a clamp in these kernels cannot have: "
        "group scales rounded anew, relative error %.1e",
        int((scale != largest).any(dim=-1).sum()),
        error,
    )
    return StoredWeight(gate_up.shape, {**gate_up.tensors, GROUP_SCALE: rounded, MATRIX_SCALE: largest.contiguous()})
