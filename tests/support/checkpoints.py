"""Small checkpoints in the published layout, made from a seed: hub config, hub tensor names, tokenizer, template.

`write_checkpoint` draws random weights; `write_golden` computes those of the golden vectors from tensor names.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from srt.configs.images import features_of

Shapes = dict[str, tuple[int, ...]]

LEADING = ("<|bos|>", "<|eos|>", "<|pad|>")
CHAT = ("<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<im_patch>", "<patch_start>", "<patch_end>",
        "<patch_newline>")  # fmt: skip
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content or [] -%}
{{- part.text if part.type == 'text' else '<im_patch>' -}}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a checkpoint; layers that `full_layers` does not name slide."""

    vocab: int = 1024
    hidden: int = 64
    layers: int = 5
    full_layers: tuple[int, ...] = (0, 4)
    dense_layers: int = 1
    dense_width: int = 96
    heads: int = 4
    sliding_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 24
    experts: int = 8
    chosen: int = 2
    expert_width: int = 32
    shared_width: int = 32
    mtp: int = 3
    max_positions: int = 4096
    original_positions: int = 256
    limits: tuple[float, float] = (7.0, 16.0)
    """Clamps of the routed and of the shared experts in the last two layers; 0 is none."""
    vision_width: int = 32
    vision_layers: int = 2
    vision_heads: int = 2
    vision_mlp: int = 128
    image_size: int = 112
    crop_size: int = 84

    def kind(self, layer: int) -> str:
        """Attention kind of a layer; MTP layers slide."""
        return "full_attention" if layer in self.full_layers else "sliding_attention"


PRESETS = {
    "tiny": Geometry(),
    "nano": Geometry(
        vocab=4096, hidden=128, layers=4, full_layers=(0,), dense_width=384, head_dim=32, window=64, expert_width=128,
        shared_width=128, max_positions=8192, original_positions=4096, vision_width=64, vision_heads=4,
        vision_mlp=256, image_size=728, crop_size=504,
    ),
}  # fmt: skip

GOLDEN = Geometry(
    vocab=128, dense_layers=2, window=4, expert_width=48, shared_width=40, limits=(0.3, 0.4), vision_layers=3,
    vision_mlp=186,
)  # fmt: skip


def write_checkpoint(
    directory: Path,
    preset: str = "tiny",
    *,
    seed: int = 0,
    vision: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """Write a checkpoint of random weights; `changes` are fields of `Geometry`. Returns the directory."""
    geometry = replace(PRESETS[preset], **changes)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(geometry.vocab)
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in (*LEADING, *CHAT)}
    _write_json(directory / "config.json", hub_config(geometry, ids, vision=vision, dtype=dtype))
    _write_tokenizer(directory, tokenizer, ids)
    if vision:
        _write_json(directory / "preprocessor_config.json", processor_config(geometry))
    shapes = text_shapes(geometry) | (vision_shapes(geometry) if vision else {})
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, generator).to(_stored(name, dtype)) for name, shape in shapes.items()}
    _save(directory, tensors, shards)
    return directory


def write_golden(directory: Path, *, vision: bool = True, mtp: bool = False) -> Path:
    """Write the checkpoint of the golden vectors, float32, without a tokenizer. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    geometry = GOLDEN if mtp else replace(GOLDEN, mtp=0)
    ids = {"<|bos|>": 0, "<|eos|>": 1, "<|im_end|>": 2, "<|pad|>": 3, "<im_patch>": 101}
    _write_json(directory / "config.json", hub_config(geometry, ids, vision=vision, dtype=torch.float32))
    if vision:
        _write_json(directory / "preprocessor_config.json", processor_config(geometry))
    shapes = text_shapes(geometry) | (vision_shapes(geometry) if vision else {})
    _save(directory, {name: golden_tensor(name, shape) for name, shape in shapes.items()}, 1)
    return directory


def golden_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values that a name stands for: a quadratic residue walk, scaled by the kind of tensor."""
    seed = sum((k + 1) * ord(letter) for k, letter in enumerate(name)) % 65521
    at = torch.arange(math.prod(shape), dtype=torch.int64)
    residue = (31 * at * at + 7919 * at + 104729 * seed + 12345) % 65521
    gains = ("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight", ".bias",
             "in_proj_bias", ".gamma")  # fmt: skip
    scale = 1.0 if "router_bias" in name else 0.4 if name.endswith(gains) else 0.5
    return (scale * (residue.double() / 65521 - 0.5)).float().view(shape)


# --- config ----------------------------------------------------------------------------------------------


def hub_config(geometry: Geometry, ids: dict[str, int], *, vision: bool, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the published spelling: per-layer lists go on for the MTP layers."""
    special = {
        "bos_token_id": ids["<|bos|>"],
        "eos_token_id": [ids["<|eos|>"], ids["<|im_end|>"]],
        "pad_token_id": ids["<|pad|>"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    text = _text_config(geometry) | special
    if not vision:
        return text
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        **special,
        "image_token_id": ids["<im_patch>"],
        "image_token_len": features_of(geometry.image_size, 14),
        "patch_token_len": features_of(geometry.crop_size, 14),
        "understand_projector_stride": 2,
        "projector_bias": False,
        "vision_config": {
            "model_type": "perception_encoder", "image_size": geometry.image_size, "patch_size": 14,
            "width": geometry.vision_width, "layers": geometry.vision_layers, "heads": geometry.vision_heads,
            "mlp_ratio": geometry.vision_mlp / geometry.vision_width, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "ls_init_value": 0.1, "use_cls_token": False, "use_ln_pre": True,
            "use_ln_post": False, "use_abs_posemb": True, "use_rope2d": True, "pool_type": "none",
        },
        "text_config": text,
    }  # fmt: skip


def processor_config(geometry: Geometry) -> dict[str, Any]:
    """preprocessor_config.json as transformers writes it."""
    return {
        "image_processor_type": "Step3p7ImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 2,
        "size": {"height": geometry.image_size, "width": geometry.image_size}, "patch_size": geometry.crop_size,
        "max_image_size": 3024, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "vision_patch_size": 14, "downsampler_stride": 4,
    }  # fmt: skip


def _text_config(g: Geometry) -> dict[str, Any]:
    total = g.layers + g.mtp
    full = [g.kind(layer) == "full_attention" for layer in range(total)]
    clamped = [g.layers - 2 <= layer < g.layers for layer in range(total)]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": g.hidden,
        "intermediate_size": g.dense_width,
        "num_hidden_layers": g.layers,
        "num_nextn_predict_layers": g.mtp,
        "num_attention_heads": g.heads,
        "num_attention_groups": g.kv_heads,
        "head_dim": g.head_dim,
        "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": g.sliding_heads,
            "num_attention_groups": g.kv_heads, "head_dim": g.head_dim, "true_head_dim": g.head_dim,
        },
        "vocab_size": g.vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": g.max_positions,
        "max_seq_len": g.max_positions,
        "tie_word_embeddings": False,
        "moe_num_experts": g.experts,
        "moe_top_k": g.chosen,
        "moe_intermediate_size": g.expert_width,
        "moe_layers_enum": ",".join(str(layer) for layer in range(g.dense_layers, g.layers)),
        "share_expert_dim": g.shared_width,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "att_impl_type": "GQA",
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "zero_centered": True,
        "sink": False,
        "layer_types": [g.kind(layer) for layer in range(total)],
        "sliding_window": g.window,
        "rope_theta": [5_000_000.0 if is_full else 10_000.0 for is_full in full],
        "partial_rotary_factors": [0.5 if is_full else 1.0 for is_full in full],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": g.original_positions,
            "low_freq_factor": 1.0, "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "swiglu_limits": [g.limits[0] if clamp else 0.0 for clamp in clamped],
        "swiglu_limits_shared": [g.limits[1] if clamp else 0.0 for clamp in clamped],
    }  # fmt: skip


# --- tensors ---------------------------------------------------------------------------------------------


def text_shapes(g: Geometry) -> Shapes:
    """Tensors of the language model and its MTP layers, by hub name."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (g.vocab, g.hidden),
        "model.norm.weight": (g.hidden,),
        "lm_head.weight": (g.vocab, g.hidden),
    }
    for layer in range(g.layers + g.mtp):
        at = f"model.layers.{layer}."
        heads = g.heads if g.kind(layer) == "full_attention" else g.sliding_heads
        shapes |= {
            f"{at}input_layernorm.weight": (g.hidden,),
            f"{at}post_attention_layernorm.weight": (g.hidden,),
            f"{at}self_attn.q_proj.weight": (heads * g.head_dim, g.hidden),
            f"{at}self_attn.k_proj.weight": (g.kv_heads * g.head_dim, g.hidden),
            f"{at}self_attn.v_proj.weight": (g.kv_heads * g.head_dim, g.hidden),
            f"{at}self_attn.o_proj.weight": (g.hidden, heads * g.head_dim),
            f"{at}self_attn.g_proj.weight": (heads, g.hidden),
            f"{at}self_attn.q_norm.weight": (g.head_dim,),
            f"{at}self_attn.k_norm.weight": (g.head_dim,),
        }
        if g.dense_layers <= layer < g.layers:
            shapes |= _expert_shapes(at, g) | _mlp_shapes(f"{at}share_expert.", g.hidden, g.shared_width)
        else:
            shapes |= _mlp_shapes(f"{at}mlp.", g.hidden, g.dense_width)
        if layer >= g.layers:
            shapes |= {
                f"{at}enorm.weight": (g.hidden,),
                f"{at}hnorm.weight": (g.hidden,),
                f"{at}eh_proj.weight": (g.hidden, 2 * g.hidden),
                f"{at}transformer.shared_head.norm.weight": (g.hidden,),
                f"{at}transformer.shared_head.output.weight": (g.vocab, g.hidden),
            }
    return shapes


def _mlp_shapes(at: str, hidden: int, width: int) -> Shapes:
    gates: Shapes = {f"{at}{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
    return gates | {f"{at}down_proj.weight": (hidden, width)}


def _expert_shapes(at: str, g: Geometry) -> Shapes:
    return {
        f"{at}moe.gate.weight": (g.experts, g.hidden),
        f"{at}moe.router_bias": (g.experts,),
        f"{at}moe.gate_proj.weight": (g.experts, g.expert_width, g.hidden),
        f"{at}moe.up_proj.weight": (g.experts, g.expert_width, g.hidden),
        f"{at}moe.down_proj.weight": (g.experts, g.hidden, g.expert_width),
    }


def vision_shapes(g: Geometry) -> Shapes:
    """Tensors of the image tower and the projector, by hub name."""
    width, tower = g.vision_width, "vision_model."
    shapes: Shapes = {
        f"{tower}conv1.weight": (width, 3, 14, 14),
        f"{tower}positional_embedding": ((g.image_size // 14) ** 2, width),
        f"{tower}vit_downsampler1.weight": (2 * width, width, 3, 3),
        f"{tower}vit_downsampler1.bias": (2 * width,),
        f"{tower}vit_downsampler2.weight": (4 * width, 2 * width, 3, 3),
        f"{tower}vit_downsampler2.bias": (4 * width,),
        "vit_large_projector.weight": (g.hidden, 4 * width),
    }
    for part in ("weight", "bias"):
        shapes[f"{tower}ln_pre.{part}"] = (width,)
    for layer in range(g.vision_layers):
        at = f"{tower}transformer.resblocks.{layer}."
        shapes |= {f"{at}{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {
            f"{at}attn.in_proj_weight": (3 * width, width),
            f"{at}attn.in_proj_bias": (3 * width,),
            f"{at}attn.out_proj.weight": (width, width),
            f"{at}attn.out_proj.bias": (width,),
            f"{at}ls_1.gamma": (width,),
            f"{at}ls_2.gamma": (width,),
            f"{at}mlp.c_fc.weight": (g.vision_mlp, width),
            f"{at}mlp.c_fc.bias": (g.vision_mlp,),
            f"{at}mlp.c_proj.weight": (width, g.vision_mlp),
            f"{at}mlp.c_proj.bias": (width,),
        }
    return shapes


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that spread logits over a few units, so that greedy choices survive bfloat16."""
    if len(shape) == 1:
        unit = "vision_model" in name and name.endswith(("ln_1.weight", "ln_2.weight", "ln_pre.weight"))
        return torch.empty(shape).normal_(1.0 if unit else 0.0, 0.05, generator=generator)
    fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
    scale = 1.0 if "embed_tokens" in name else 2.0 / fan_in**0.5 if "lm_head" in name else 0.6 / fan_in**0.5
    return torch.empty(shape).normal_(0.0, scale, generator=generator)


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    """Routers are published in float32."""
    return torch.float32 if name.endswith(("moe.gate.weight", "moe.router_bias")) else dtype


def _save(directory: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, str(directory / "model.safetensors"))
        return
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, str(directory / file))
        index |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


# --- tokenizer -------------------------------------------------------------------------------------------


def _corpus() -> Iterator[str]:
    """Sentences of made-up words, common ones often, with numbers and punctuation."""
    rng = random.Random(0)
    syllables = [
        onset + vowel + coda for onset in "bdfgklmnprstvz" for vowel in "aeiou" for coda in ("", "n", "r", "st")
    ]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(6000)]
    for _ in range(4000):
        sentence = [words[int(len(words) * rng.random() ** 3)] for _ in range(rng.randrange(3, 14))]
        yield f"{' '.join(sentence).capitalize()}{rng.choice(('.', '?', ':', ', '))} {rng.randrange(1000)}\n"


def _tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab` ids: leading specials, bytes, merges, trailing specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    learned = vocab - len(CHAT) - len(MARKS)
    trainer = trainers.BpeTrainer(
        vocab_size=learned, min_frequency=1, show_progress=False, special_tokens=list(LEADING),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)
    # A corpus this small may run out of merges: unused ids keep the table as wide as the embedding.
    spare = range(tokenizer.get_vocab_size(), learned)
    tokenizer.add_tokens([AddedToken(f"<spare_{number}>", normalized=False) for number in spare])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKS])
    assert tokenizer.get_vocab_size() == vocab
    return tokenizer


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos, pad = LEADING
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names},
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": ids[bos], "eos_token_id": [ids[eos], ids["<|im_end|>"]], "pad_token_id": ids[pad]},
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
