"""Stand-ins for the TRT-LLM-Gen entry points that route by themselves: the router's rule, then the routed ones.

They round routing weights to bfloat16, as the real ones do; the runtime calls the others for that reason. What they
are handed is the same: so weights that were prepared for one kind are right for the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.trtllm import (
    BLOCK_MAJOR_K,
    DEEP_SEEK_FP8,
    MAJOR_K,
    SWIGLU,
    Routed,
    trtllm_bf16_routed_moe,
    trtllm_fp4_block_scale_routed_moe,
    trtllm_fp8_block_scale_routed_moe,
)

MINIMAX = 7
"""Sigmoid, bias for the choice only, weights renormalised and times the factor: the rule of the Step models."""


def routed(logits: Tensor, bias: Tensor | None, top_k: int, factor: float | None, method: int) -> Routed:
    """Ids [T, K] int32 and weights [T, K], which have passed through bfloat16."""
    assert method == MINIMAX and bias is not None and logits.dtype is torch.float32
    scores = logits.sigmoid()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(1, ids)
    weights = chosen * (1.0 if factor is None else factor) / (chosen.sum(-1, keepdim=True) + 1e-20)
    return ids.int(), weights.bfloat16().float()


def trtllm_bf16_moe(
    routing_logits: Tensor, routing_bias: Tensor | None, hidden_states: Tensor, gemm1_weights: Tensor,
    gemm2_weights: Tensor, num_experts: int, top_k: int, n_group: int | None, topk_group: int | None,
    intermediate_size: int, local_expert_offset: int, local_num_experts: int,
    routed_scaling_factor: float | None = None, routing_method_type: int = 0, use_shuffled_weight: bool = True,
    weight_layout: int = BLOCK_MAJOR_K, do_finalize: bool = True, enable_pdl: bool = True,
    tune_max_num_tokens: int = 8192, activation_type: int = SWIGLU, norm_topk_prob: bool = True,
    routing_replay_out: Tensor | None = None, gemm1_alpha: Tensor | None = None, gemm1_beta: Tensor | None = None,
    gemm1_clamp_limit: Tensor | None = None, output: Tensor | None = None,
) -> Tensor:  # fmt: skip
    chosen = routed(routing_logits, routing_bias, top_k, routed_scaling_factor, routing_method_type)
    return trtllm_bf16_routed_moe(
        chosen, hidden_states, gemm1_weights, gemm2_weights, num_experts, top_k, n_group, topk_group,
        intermediate_size, local_expert_offset, local_num_experts, None, routing_method_type, use_shuffled_weight,
        weight_layout, activation_type=activation_type, gemm1_alpha=gemm1_alpha, gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
    )  # fmt: skip


def trtllm_fp8_block_scale_moe(
    routing_logits: Tensor, routing_bias: Tensor | None, hidden_states: Tensor, hidden_states_scale: Tensor,
    gemm1_weights: Tensor, gemm1_weights_scale: Tensor, gemm2_weights: Tensor, gemm2_weights_scale: Tensor,
    num_experts: int, top_k: int, n_group: int | None, topk_group: int | None, intermediate_size: int,
    local_expert_offset: int, local_num_experts: int, routed_scaling_factor: float | None,
    routing_method_type: int = 0, use_shuffled_weight: bool = False, weight_layout: int = MAJOR_K,
    do_finalize: bool = True, enable_pdl: bool | None = None, tune_max_num_tokens: int = 8192,
    fp8_quantization_type: int = DEEP_SEEK_FP8, num_fused_shared_experts: int | None = None,
    activation_type: int = SWIGLU, norm_topk_prob: bool = True, routing_replay_out: Tensor | None = None,
    gemm1_alpha: Tensor | None = None, gemm1_beta: Tensor | None = None, gemm1_clamp_limit: Tensor | None = None,
    output: Tensor | None = None, valid_hidden_size: int | None = None, valid_intermediate_size: int | None = None,
    *, gemm1_bias: Tensor | None = None, gemm2_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert gemm1_bias is None and gemm2_bias is None and not num_fused_shared_experts
    chosen = routed(routing_logits, routing_bias, top_k, routed_scaling_factor, routing_method_type)
    return trtllm_fp8_block_scale_routed_moe(
        chosen, None, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights,
        gemm2_weights_scale, num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset,
        local_num_experts, None, routing_method_type, use_shuffled_weight, weight_layout,
        activation_type=activation_type, gemm1_clamp_limit=gemm1_clamp_limit,
    )  # fmt: skip


def trtllm_fp4_block_scale_moe(
    routing_logits: Tensor, routing_bias: Tensor | None, hidden_states: Tensor, hidden_states_scale: Tensor | None,
    gemm1_weights: Tensor, gemm1_weights_scale: Tensor, gemm1_bias: Tensor | None, gemm1_alpha: Tensor | None,
    gemm1_beta: Tensor | None, gemm1_clamp_limit: Tensor | None, gemm2_weights: Tensor, gemm2_weights_scale: Tensor,
    gemm2_bias: Tensor | None, output1_scale_scalar: Tensor | None, output1_scale_gate_scalar: Tensor | None,
    output2_scale_scalar: Tensor | None, num_experts: int, top_k: int, n_group: int | None, topk_group: int | None,
    intermediate_size: int, local_expert_offset: int, local_num_experts: int, routed_scaling_factor: float | None,
    routing_method_type: int = 0, do_finalize: bool = True, enable_pdl: bool | None = None,
    activation_type: int = SWIGLU, per_token_scale: Tensor | None = None, output: Tensor | None = None,
    tune_max_num_tokens: int = 8192, norm_topk_prob: bool = True, routing_replay_out: Tensor | None = None,
    num_fused_shared_experts: int | None = None, valid_hidden_size: int | None = None,
    valid_intermediate_size: int | None = None, hidden_states_scale_layout: int | None = None,
) -> list[Tensor]:  # fmt: skip
    chosen = routed(routing_logits, routing_bias, top_k, routed_scaling_factor, routing_method_type)
    return trtllm_fp4_block_scale_routed_moe(
        chosen, None, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias, gemm1_alpha,
        gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias, output1_scale_scalar,
        output1_scale_gate_scalar, output2_scale_scalar, num_experts, top_k, n_group, topk_group, intermediate_size,
        local_expert_offset, local_num_experts, None, routing_method_type, activation_type=activation_type,
        hidden_states_scale_layout=hidden_states_scale_layout,
    )  # fmt: skip
