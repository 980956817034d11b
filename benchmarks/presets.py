"""Step-3.7-Flash's language model with its true widths, whole or a slice of its depth, for weights that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

PRESETS: Final = {"slice8": 8, "full45": 45}
"""Layers of each preset: the first three are dense, one in four sees everything."""
FORMATS: Final = ("bf16", "fp8", "nvfp4")
MTP_MODULES: Final = 3
QUANTIZATION: Final[dict[str, dict[str, Any]]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
}


def write_preset(directory: Path, preset: str, form: str, *, mtp: bool = False) -> Path:
    """Write the config.json of a preset whose routed experts have a format. Returns the directory."""
    config = preset_config(PRESETS[preset], MTP_MODULES if mtp else 0)
    if form != "bf16":
        config["quantization_config"] = QUANTIZATION[form]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def preset_config(layers: int, mtp: int) -> dict[str, Any]:
    """The published configuration cut to so many layers; lists go on for the MTP modules."""
    kinds = ["full_attention" if at < layers and at % 4 == 0 else "sliding_attention" for at in range(layers + mtp)]
    full = [kind == "full_attention" for kind in kinds]
    clamped = [43 <= at < layers for at in range(layers + mtp)]
    return {
        "architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5", "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 1,
        "hidden_size": 4096, "intermediate_size": 11264, "num_hidden_layers": layers, "num_nextn_predict_layers": mtp,
        "num_attention_heads": 64, "num_attention_groups": 8, "head_dim": 128,
        "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8,
            "head_dim": 128, "true_head_dim": 128,
        },
        "vocab_size": 128896, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "max_seq_len": 262144,
        "tie_word_embeddings": False, "moe_num_experts": 288, "moe_top_k": 8, "moe_intermediate_size": 1280,
        "moe_layers_enum": ",".join(str(at) for at in range(3, layers)), "share_expert_dim": 1280,
        "norm_expert_weight": True, "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True, "need_fp32_gate": True, "att_impl_type": "GQA", "use_qk_norm": True,
        "use_head_wise_attn_gate": True, "zero_centered": True, "sink": False,
        "layer_types": kinds, "sliding_window": 512,
        "rope_theta": [5_000_000.0 if one else 10_000.0 for one in full],
        "partial_rotary_factors": [0.5 if one else 1.0 for one in full],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0, "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"], "use_rope_layers": [],
        "swiglu_limits": [7.0 if one else 0.0 for one in clamped],
        "swiglu_limits_shared": [16.0 if at == 44 else 0.0 for at in range(layers + mtp)],
    }  # fmt: skip
