"""The published releases' configurations, for plans without files: geometry only, no tokenizer and no weights.

Source: config.json of Step-3.7-Flash in BF16, FP8 and NVFP4. The NVFP4 release has no MTP modules.
"""

from __future__ import annotations

from typing import Any, Final

PREFIX: Final = "preset:"
MAIN, MTP = 45, 3


def _text(mtp: int) -> dict[str, Any]:
    layers = MAIN + mtp
    kinds = ["full_attention" if layer % 4 == 0 and layer < MAIN else "sliding_attention" for layer in range(layers)]
    full = [kind == "full_attention" for kind in kinds]
    scaling = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 131072,
               "low_freq_factor": 1.0, "high_freq_factor": 32.0}  # fmt: skip
    sliding = {"attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8,
               "head_dim": 128, "true_head_dim": 128}  # fmt: skip
    return {
        "model_type": "step3p5", "dtype": "bfloat16", "hidden_size": 4096, "vocab_size": 128896,
        "intermediate_size": 11264, "num_hidden_layers": MAIN, "num_nextn_predict_layers": mtp,
        "num_attention_heads": 64, "num_attention_groups": 8, "head_dim": 128, "attention_other_setting": sliding,
        "layer_types": kinds, "sliding_window": 512, "rms_norm_eps": 1e-5,
        "rope_theta": [5e6 if one else 1e4 for one in full],
        "partial_rotary_factors": [0.5 if one else 1.0 for one in full],
        "rope_scaling": scaling, "yarn_only_types": ["full_attention"],
        "max_position_embeddings": 262144, "max_seq_len": 262144,
        "moe_layers_enum": ",".join(map(str, range(3, MAIN))), "moe_num_experts": 288, "moe_top_k": 8,
        "moe_intermediate_size": 1280, "share_expert_dim": 1280, "moe_router_scaling_factor": 3.0,
        "moe_router_activation": "sigmoid", "use_moe_router_bias": True, "norm_expert_weight": True,
        "need_fp32_gate": True, "use_head_wise_attn_gate": True, "use_qk_norm": True, "zero_centered": True,
        "sink": False, "att_impl_type": "GQA", "tie_word_embeddings": False,
        "swiglu_limits": [7.0 if layer in (43, 44) else 0.0 for layer in range(layers)],
        "swiglu_limits_shared": [16.0 if layer in (43, 44) else 0.0 for layer in range(layers)],
    }  # fmt: skip


VISION: Final[dict[str, Any]] = {
    "model_type": "perception_encoder", "width": 1536, "layers": 47, "heads": 16, "patch_size": 14, "image_size": 728,
    "mlp_ratio": 8960 / 1536, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "use_cls_token": False,
    "use_ln_pre": True, "use_ln_post": False, "use_abs_posemb": True, "use_rope2d": True, "ls_init_value": 0.1,
    "pool_type": "none",
}  # fmt: skip
FP8: Final = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NVFP4: Final = {
    "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": [],
    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
}  # fmt: skip


def _whole(mtp: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Step3p7ForConditionalGeneration"], "model_type": "step3p7", "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007], "image_token_id": 128001, "image_token_len": 169, "patch_token_len": 81,
        "understand_projector_stride": 2, "projector_bias": False, "text_config": _text(mtp), "vision_config": VISION,
    } | more  # fmt: skip


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "step-3.7-flash": _whole(MTP),
    "step-3.7-flash-fp8": _whole(MTP, quantization_config=FP8),
    "step-3.7-flash-nvfp4": _whole(0, quantization_config=NVFP4),
}
"""Content of config.json by the name behind `preset:`."""
