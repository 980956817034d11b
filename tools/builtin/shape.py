"""Sizes of the built-in model, and the config.json that states them in the vendor's spelling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tools.builtin import text

Kind = Literal["full_attention", "sliding_attention"]
FULL: Final[Kind] = "full_attention"
SLIDING: Final[Kind] = "sliding_attention"


@dataclass(frozen=True)
class VisionShape:
    """The tower: a narrow one, since each image has 2,704 patches."""

    width: int = 64
    layers: int = 3
    heads: int = 2
    mlp_ratio: float = 4.0
    patch: int = 14
    image: int = 728


@dataclass(frozen=True)
class Shape:
    """The text model and its MTP modules. Layer 0 and every fourth after it see everything."""

    vocabulary: int = text.VOCABULARY
    hidden: int = 256
    layers: int = 8
    modules: int = 3
    dense_layers: int = 3
    intermediate: int = 192
    heads: int = 4
    sliding_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    window: int = 64
    experts: int = 8
    chosen: int = 2
    expert_width: int = 64
    shared_width: int = 64
    factor: float = 3.0
    limit: float = 1.0
    shared_limit: float = 1.5
    clamped_layers: int = 2
    context: int = 4096
    theta_full: float = 5_000_000.0
    theta_sliding: float = 10_000.0
    scaling_factor: float = 2.0
    scaling_low: float = 1.0
    scaling_high: float = 32.0
    epsilon: float = 1e-5
    vision: VisionShape = field(default_factory=VisionShape)

    def kind(self, layer: int) -> Kind:
        """Attention type of a main or MTP layer."""
        return FULL if layer < self.layers and layer % 4 == 0 else SLIDING

    def routed(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.dense_layers <= layer < self.layers

    def clamped(self, layer: int) -> bool:
        """Whether a layer clamps its activations."""
        return self.layers - self.clamped_layers <= layer < self.layers

    def rotary(self, kind: Kind) -> int:
        """Number of rotated dimensions of a head."""
        return self.head_dim // 2 if kind == FULL else self.head_dim

    @property
    def scaling_original(self) -> int:
        """Context length the unscaled frequencies are meant for."""
        return self.context // 2


def smoke_shape() -> Shape:
    """A very small model of the same structure, to try the code with."""
    return Shape(hidden=64, intermediate=64, expert_width=32, shared_width=32, head_dim=32,
                 vision=VisionShape(width=16, layers=1, heads=2))  # fmt: skip


def text_config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    """Return the `text_config`; per-layer lists cover the MTP layers too."""
    every = range(shape.layers + shape.modules)
    kinds = [shape.kind(layer) for layer in every]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_nextn_predict_layers": shape.modules,
        "num_attention_heads": shape.heads,
        "num_attention_groups": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.epsilon,
        "max_seq_len": shape.context,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "use_moe": True,
        "moe_num_experts": shape.experts,
        "moe_top_k": shape.chosen,
        "moe_intermediate_size": shape.expert_width,
        "moe_every_n_layer": 1,
        "moe_layer_offset": 0,
        "moe_layers_enum": ",".join(str(layer) for layer in every if shape.routed(layer)),
        "share_expert_dim": shape.shared_width,
        "share_expert_dims": shape.shared_width,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": shape.factor,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "att_impl_type": "GQA",
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "zero_centered": True,
        "sink": False,
        "attention_bias": False,
        "layer_types": kinds,
        "sliding_window": shape.window,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": shape.sliding_heads,
            "num_attention_groups": shape.kv_heads,
            "head_dim": shape.head_dim,
            "true_head_dim": shape.head_dim,
        },
        "rope_theta": [shape.theta_full if kind == FULL else shape.theta_sliding for kind in kinds],
        "partial_rotary_factors": [shape.rotary(kind) / shape.head_dim for kind in kinds],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": shape.scaling_factor,
            "original_max_position_embeddings": shape.scaling_original,
            "low_freq_factor": shape.scaling_low,
            "high_freq_factor": shape.scaling_high,
        },
        "yarn_only_types": [FULL],
        "use_rope_layers": [],
        "swiglu_limits": [shape.limit if shape.clamped(layer) else 0.0 for layer in every],
        "swiglu_limits_shared": [shape.shared_limit if shape.clamped(layer) else 0.0 for layer in every],
        **_token_fields(ids),
    }


def config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    """Return the whole config.json."""
    vision = shape.vision
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "im_start_token": "<im_start>",
        "im_end_token": "<im_end>",
        "im_patch_token": text.PATCH,
        "image_token_id": ids[text.PATCH],
        "image_token_len": 169,
        "patch_token_len": 81,
        "understand_projector_stride": 2,
        "projector_bias": False,
        "use_im_start_end": True,
        "vision_select_layer": -1,
        **_token_fields(ids),
        "vision_config": {
            "model_type": "perception_encoder",
            "image_size": vision.image,
            "patch_size": vision.patch,
            "num_channels": 3,
            "width": vision.width,
            "layers": vision.layers,
            "heads": vision.heads,
            "mlp_ratio": vision.mlp_ratio,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "ls_init_value": 0.1,
            "use_cls_token": False,
            "use_ln_pre": True,
            "use_ln_post": False,
            "use_abs_posemb": True,
            "use_rope2d": True,
            "output_dim": None,
            "pool_type": "none",
        },
        "text_config": text_config(shape, ids),
    }


def _token_fields(ids: dict[str, int]) -> dict[str, Any]:
    stops = [ids[text.EOS], ids[text.PAD], ids[text.TURN_END]]
    return {"bos_token_id": ids[text.BOS], "eos_token_id": stops, "pad_token_id": ids[text.PAD]}
