"""A stand-in for FlashInfer's TRT-LLM-Gen entry points: their signatures, and their results in float32 on a CPU.

The layouts are undone from their descriptions (row maps, tiles), not with the functions that make them. Arguments that
the real functions would reject are rejected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from srt.layers.moe.trtllm import TrtllmKernels
from srt.layers.quant.fp8 import encode_tokens

SWIGLU, SWIGLU_STEP, LINEAR = 3, 7, 2
DEEP_SEEK_FP8, MAJOR_K, BLOCK_MAJOR_K = 1, 0, 2
STEP_LIMIT = 7.0
"""Clamp of SwigluStep when none is given."""
ROW_MAP = (0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
           4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31)  # fmt: skip
"""Place in a shuffled block of 32 rows of each row of the block."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Routed = tuple[Tensor, Tensor]


def standin() -> TrtllmKernels:
    """The stand-in functions, and encoders in plain torch."""
    return TrtllmKernels(
        bf16=trtllm_bf16_routed_moe,
        fp8=trtllm_fp8_block_scale_routed_moe,
        fp4=trtllm_fp4_block_scale_routed_moe,
        encode_fp8=encode_tokens,
        encode_fp4=encode_fp4,
        swiglu=SWIGLU,
        swiglu_step=SWIGLU_STEP,
        linear_scales=LINEAR,
    )


def trtllm_bf16_routed_moe(
    topk_ids: Routed, hidden_states: Tensor, gemm1_weights: Tensor, gemm2_weights: Tensor, num_experts: int,
    top_k: int, n_group: int | None, topk_group: int | None, intermediate_size: int, local_expert_offset: int,
    local_num_experts: int, routed_scaling_factor: float | None = None, routing_method_type: int = 0,
    use_shuffled_weight: bool = True, weight_layout: int = BLOCK_MAJOR_K, do_finalize: bool = True,
    enable_pdl: bool = True, gemm1_lora_delta: Tensor | None = None, tune_max_num_tokens: int = 8192,
    activation_type: int = SWIGLU, routing_replay_out: Tensor | None = None, gemm1_alpha: Tensor | None = None,
    gemm1_beta: Tensor | None = None, gemm1_clamp_limit: Tensor | None = None, output: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert use_shuffled_weight and weight_layout == BLOCK_MAJOR_K and intermediate_size % 128 == 0
    assert gemm1_alpha is None and gemm1_beta is None and hidden_states.dtype is torch.bfloat16
    first, second = (weight.transpose(1, 2).flatten(2).float() for weight in (gemm1_weights, gemm2_weights))
    assert first.shape == (local_num_experts, 2 * intermediate_size, hidden_states.shape[1])
    up, gate = halves(unshuffled(first))
    second = unshuffled(second)

    def expert(number: int, x: Tensor) -> Tensor:
        limit = limit_of(activation_type, gemm1_clamp_limit, number)
        inner = activated(x @ gate[number].T, x @ up[number].T, limit, limit)
        return inner @ second[number].T

    check_routing(topk_ids, num_experts, top_k, local_expert_offset, local_num_experts, routed_scaling_factor)
    return summed(topk_ids, hidden_states.float(), local_expert_offset, local_num_experts, expert).bfloat16()


def trtllm_fp8_block_scale_routed_moe(
    topk_ids: Routed, routing_bias: Tensor | None, hidden_states: Tensor, hidden_states_scale: Tensor,
    gemm1_weights: Tensor, gemm1_weights_scale: Tensor, gemm2_weights: Tensor, gemm2_weights_scale: Tensor,
    num_experts: int, top_k: int, n_group: int | None, topk_group: int | None, intermediate_size: int,
    local_expert_offset: int, local_num_experts: int, routed_scaling_factor: float | None,
    routing_method_type: int = 0, use_shuffled_weight: bool = False, weight_layout: int = MAJOR_K,
    do_finalize: bool = True, enable_pdl: bool | None = None, gemm1_lora_delta: Tensor | None = None,
    output: Tensor | None = None, tune_max_num_tokens: int = 8192, fp8_quantization_type: int = DEEP_SEEK_FP8,
    activation_type: int = SWIGLU, gemm1_alpha: Tensor | None = None, gemm1_beta: Tensor | None = None,
    gemm1_clamp_limit: Tensor | None = None, valid_hidden_size: int | None = None,
    valid_intermediate_size: int | None = None,
) -> Tensor:  # fmt: skip
    assert not use_shuffled_weight and weight_layout == MAJOR_K and intermediate_size % 128 == 0
    assert activation_type == SWIGLU, "SwigluStep requires MxFp8"
    tokens, hidden = hidden_states.shape
    assert hidden_states.dtype is torch.float8_e4m3fn and hidden_states_scale.shape == (hidden // 128, tokens)
    assert gemm1_weights_scale.shape == (local_num_experts, 2 * intermediate_size // 128, hidden // 128)
    x = hidden_states.float() * hidden_states_scale.T.repeat_interleave(128, dim=1)
    first, second = blocks(gemm1_weights, gemm1_weights_scale), blocks(gemm2_weights, gemm2_weights_scale)

    def expert(number: int, x: Tensor) -> Tensor:
        up, gate = (x @ first[number].T).chunk(2, dim=-1)
        codes, scale = encode_tokens(activated(gate, up, math.inf, math.inf))
        return (codes.float() * scale.repeat_interleave(128, dim=1)) @ second[number].T

    check_routing(topk_ids, num_experts, top_k, local_expert_offset, local_num_experts, routed_scaling_factor)
    return summed(topk_ids, x, local_expert_offset, local_num_experts, expert)


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: Routed, routing_bias: Tensor | None, hidden_states: Tensor, hidden_states_scale: Tensor | None,
    gemm1_weights: Tensor, gemm1_weights_scale: Tensor, gemm1_bias: Tensor | None, gemm1_alpha: Tensor | None,
    gemm1_beta: Tensor | None, gemm1_clamp_limit: Tensor | None, gemm2_weights: Tensor, gemm2_weights_scale: Tensor,
    gemm2_bias: Tensor | None, output1_scale_scalar: Tensor | None, output1_scale_gate_scalar: Tensor | None,
    output2_scale_scalar: Tensor | None, num_experts: int, top_k: int, n_group: int | None, topk_group: int | None,
    intermediate_size: int, local_expert_offset: int, local_num_experts: int, routed_scaling_factor: float | None,
    routing_method_type: int = 0, do_finalize: bool = True, enable_pdl: bool | None = None,
    activation_type: int = SWIGLU, per_token_scale: Tensor | None = None, output: Tensor | None = None,
    tune_max_num_tokens: int = 8192, gemm1_lora_delta: Tensor | None = None, valid_hidden_size: int | None = None,
    valid_intermediate_size: int | None = None, num_fused_shared_experts: int | None = None,
    hidden_states_scale_layout: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Sums are of codes times group scales; the scalars bring them to numbers, the clamp works on the sums."""
    assert gemm1_alpha is None and gemm1_beta is None and hidden_states_scale_layout == LINEAR
    assert hidden_states.dtype is torch.uint8 and hidden_states_scale is not None
    assert hidden_states_scale.dtype is torch.float8_e4m3fn and gemm1_weights_scale.dtype is torch.float8_e4m3fn
    gate_scale, up_scale, out_scale = output1_scale_gate_scalar, output1_scale_scalar, output2_scale_scalar
    assert gate_scale is not None and up_scale is not None and out_scale is not None
    assert {scale.shape for scale in (gate_scale, up_scale, out_scale)} == {(local_num_experts,)}
    assert gemm1_weights.shape == (local_num_experts, 2 * intermediate_size, hidden_states.shape[1])
    x = numbers(hidden_states, hidden_states_scale)
    up, gate = halves(unshuffled(numbers(gemm1_weights, untiled(gemm1_weights_scale))))
    second = unshuffled(numbers(gemm2_weights, untiled(gemm2_weights_scale)))

    def expert(number: int, x: Tensor) -> Tensor:
        raw = limit_of(activation_type, gemm1_clamp_limit, number, STEP_LIMIT / float(gate_scale[number]))
        inner = activated((x @ gate[number].T) * gate_scale[number], x @ up[number].T,
                          raw * float(gate_scale[number]), raw)  # fmt: skip
        codes, scales = encode_fp4(inner * up_scale[number], torch.ones(1))
        return (numbers(codes, scales) @ second[number].T) * out_scale[number]

    check_routing(topk_ids, num_experts, top_k, local_expert_offset, local_num_experts, routed_scaling_factor)
    return [summed(topk_ids, x, local_expert_offset, local_num_experts, expert)]


def encode_fp4(x: Tensor, factor: Tensor) -> Routed:
    """Codes and row-major group scales of x * factor, by the nearest of the eight magnitudes, ties to the even code."""
    groups = (x.float() * factor).unflatten(-1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
    ratio = torch.where(scales.float()[..., None] > 0, groups / scales.float()[..., None], 0.0)
    distance = (ratio.abs()[..., None] - torch.tensor(VALUES)).abs()
    # An odd code is a little farther: of two at one distance the even one wins.
    code = (distance + torch.tensor([0.0, 1e-7] * 4)).argmin(-1) + 8 * (ratio < 0)
    flat = code.flatten(-2).to(torch.uint8)
    return flat[..., 0::2] | (flat[..., 1::2] << 4), scales


def numbers(packed: Tensor, scales: Tensor) -> Tensor:
    """Codes times group scales."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return table[codes.long()] * scales.float().repeat_interleave(16, dim=-1)


def blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times the scale of their 128 x 128 block."""
    return codes.float() * scales.repeat_interleave(128, dim=1).repeat_interleave(128, dim=2)


def unshuffled(weight: Tensor) -> Tensor:
    """[E, M, K] out of the order of the epilogue."""
    rows = torch.arange(weight.shape[1])
    return weight[:, rows // 32 * 32 + torch.tensor(ROW_MAP)[rows % 32]]


def halves(weight: Tensor) -> Routed:
    """(up, gate) of rows that take turns."""
    return weight[:, 0::2], weight[:, 1::2]


def untiled(scales: Tensor) -> Tensor:
    """[E, M, C] out of tiles of 128 x 4, each of them 32 lines of 4 rows x 4 columns."""
    experts, rows, columns = scales.shape
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    tile = (row // 128) * (columns // 4) + column // 4
    place = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
    return scales.view(torch.uint8).reshape(experts, -1)[:, place].view(scales.dtype)


def activated(gate: Tensor, up: Tensor, limit: float, up_limit: float) -> Tensor:
    """min(silu(gate), limit) * clamp(up)."""
    return torch.nn.functional.silu(gate).clamp(max=limit) * up.clamp(-up_limit, up_limit)


def limit_of(activation: int, limits: Tensor | None, expert: int, unset: float = STEP_LIMIT) -> float:
    """The clamp of an expert; Swiglu with a clamp would put it before silu, which is another function."""
    if activation == SWIGLU:
        assert limits is None, "this clamp comes before silu"
        return math.inf
    assert activation == SWIGLU_STEP
    return unset if limits is None else float(limits[expert])


def check_routing(ids: Routed, experts: int, top_k: int, first: int, local: int, factor: float | None) -> None:
    """What the launcher checks of routing that was done before."""
    assert ids[0].dtype is torch.int32 and ids[1].dtype is torch.float32 and ids[0].shape[1] == top_k
    assert 0 < top_k <= experts and first >= 0 and first + local <= experts
    assert int(ids[0].max()) < experts and factor is None, "a factor would be applied a second time"


def summed(ids: Routed, x: Tensor, first: int, local: int, expert: Any) -> Tensor:
    """Weighted sum over the local experts of each token."""
    out = [torch.zeros(())] * x.shape[0]
    for token, place in ((t, k) for t in range(x.shape[0]) for k in range(ids[0].shape[1])):
        number = int(ids[0][token, place]) - first
        if 0 <= number < local:
            out[token] = out[token] + ids[1][token, place] * expert(number, x[token : token + 1])[0]
    return torch.stack([torch.broadcast_to(row, out[0].shape if row.dim() else (1,)) for row in out])
