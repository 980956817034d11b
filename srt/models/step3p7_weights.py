"""The weight map of Step-3.5-Flash and Step-3.7-Flash.

Two spellings: the published one and the names that transformers gives the running model; either may carry the
prefix `model.language_model.`. MTP modules that are not built are claimed by name and not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from srt.configs.census import PLAIN, SCALES
from srt.configs.quant import PREFIXES
from srt.configs.step3p7 import Step3p7Config, VisionConfig
from srt.layers.quant.contract import WEIGHT
from srt.models.step3p7_vision import pair_heads
from srt.weights.rules import Rule, RuleBook

_LAYER = "model.layers.{layer}."
_ATTENTION_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "network_norm", **_ATTENTION_NORMS}
_PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "gates"}
_EXPERT_PIECES = (("gate_proj", "gate_up", "gate"), ("up_proj", "gate_up", "up"), ("down_proj", "down", ""))
_MTP_NAMES = (
    "enorm", "hnorm", "eh_proj", "input_layernorm", "post_attention_layernorm",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.g_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "transformer.shared_head.norm", "transformer.shared_head.output", "shared_head.norm", "shared_head.head",
)  # fmt: skip


_UNREAD_TOWER = tuple(
    Rule(f"{prefix}.{{rest}}", None, part="vision")
    for prefix in ("vision_model", "vit_large_projector", "multi_modal_projector")
)
_TOWER = "vision_model."
_TOWER_BLOCK = "vision_model.transformer.resblocks.{layer}."
_TOWER_NAMES = {
    "conv1.weight": "patches",
    "positional_embedding": "positions",
    "ln_pre.weight": "first_norm.weight",
    "ln_pre.bias": "first_norm.bias",
    **{f"vit_downsampler{at}.{part}": f"downsampler{at}.{part}" for at in (1, 2) for part in ("weight", "bias")},
}
_TOWER_NAMES_SAVED = {
    "embeddings.patch_embedding.weight": "patches",
    "embeddings.position_embedding.weight": "positions",
    "pre_layernorm.weight": "first_norm.weight",
    "pre_layernorm.bias": "first_norm.bias",
    **{f"downsampler{at}.{part}": f"downsampler{at}.{part}" for at in (1, 2) for part in ("weight", "bias")},
}
_BLOCK_PARTS = {
    "attention_norm": ("ln_1", "layernorm_before"),
    "output": ("attn.out_proj", "self_attn.out_proj"),
    "network_norm": ("ln_2", "layernorm_after"),
    "up": ("mlp.c_fc", "mlp.fc1"),
    "down": ("mlp.c_proj", "mlp.fc2"),
}
"""Parts of a tower block with weight and bias: ours -> (published, saved by transformers)."""
_SCALES = {"attention_scale": ("ls_1.gamma", "lambda_1"), "network_scale": ("ls_2.gamma", "lambda_2")}


def step3p7_rules(
    checkpoint: Step3p7Config, formats: Mapping[int, str], drafts: int = 0, *, tower: bool = False
) -> RuleBook:
    """Rules for a checkpoint with this geometry; the published spelling comes first.

    `formats` says how the routed experts of each layer are stored (`srt/configs/census.py`). Of the MTP modules the
    first `drafts` are loaded. Without `tower` the tensors of the image tower are claimed and not read.
    """
    config = checkpoint.text
    producer = checkpoint.quant.producer if checkpoint.quant is not None else ""
    every = tuple(layer.index for layer in config.layers)
    routed = tuple(layer.index for layer in config.layers if layer.routed)
    dense = tuple(layer.index for layer in config.layers if not layer.routed)
    mtp = tuple(layer.index for layer in config.mtp_layers)
    left = mtp[drafts:]
    return RuleBook(
        rules=[
            Rule("model.embed_tokens.weight", "embedding.weight"),
            Rule("model.norm.weight", "norm.weight"),
            Rule("lm_head.weight", "head.weight"),
            *_block_rules(every),
            *_network_rules("mlp", "network", dense),
            *_network_rules("share_expert", "network.shared", routed),
            *_network_rules("mlp.shared_experts", "network.shared", routed),
            *_router_rules(routed),
            *(rule for index in routed for rule in _expert_rules(index, formats[index], producer)),
            *_mtp_rules(mtp[:drafts]),
            *(Rule(f"{_LAYER}{name}.weight", None, layers=left, part="mtp") for name in _MTP_NAMES if left),
            *(_tower_rules(checkpoint.vision) if tower and checkpoint.vision is not None else _UNREAD_TOWER),
        ],
        prefixes=PREFIXES,
    )


_MTP_PARTS = {
    "enorm": "token_norm",
    "hnorm": "hidden_norm",
    "eh_proj": "join",
    "transformer.shared_head.norm": "norm",
    "shared_head.norm": "norm",
    "transformer.shared_head.output": "head",
    "shared_head.head": "head",
}


def _mtp_rules(layers: tuple[int, ...]) -> list[Rule]:
    """Draft modules: a decoder layer with a dense network each, and what stands around it."""
    if not layers:
        return []
    around = [
        Rule(f"{_LAYER}{source}.weight", f"layers.{{layer}}.{target}.weight", layers=layers)
        for source, target in _MTP_PARTS.items()
    ]
    rules = [*around, *_block_rules(layers), *_network_rules("mlp", "network", layers)]
    return [replace(rule, target=(rule.target or "").replace("layers.", "draft.", 1), part="mtp") for rule in rules]


def _block_rules(layers: tuple[int, ...]) -> list[Rule]:
    """Norms and attention of a decoder layer."""
    rules = [
        Rule(f"{_LAYER}{source}.weight", f"layers.{{layer}}.{target}.weight", layers=layers)
        for source, target in _NORMS.items()
    ]
    inputs, output = "layers.{layer}.attention.inputs.weight", "layers.{layer}.attention.output.weight"
    for source, piece in _PROJECTIONS.items():
        rules.append(Rule(f"{_LAYER}self_attn.{source}.weight", inputs, (piece,), layers=layers))
    for kind in ("k", "v"):
        # ModelOpt hangs a scale of FP8 keys on the projection, compressed-tensors on the attention itself.
        for source in (f"self_attn.{kind}_proj.{kind}_scale", f"self_attn.{kind}_scale"):
            target = f"layers.{{layer}}.attention.{kind}_scale"
            rules.append(Rule(f"{_LAYER}{source}", target, layers=layers, optional=True))
    return [*rules, Rule(f"{_LAYER}self_attn.o_proj.weight", output, layers=layers)]


def _network_rules(source: str, target: str, layers: tuple[int, ...]) -> list[Rule]:
    """A dense network or a shared expert."""
    return [
        Rule(f"{_LAYER}{source}.gate_proj.weight", f"layers.{{layer}}.{target}.gate_up.weight", ("gate",), layers),
        Rule(f"{_LAYER}{source}.up_proj.weight", f"layers.{{layer}}.{target}.gate_up.weight", ("up",), layers),
        Rule(f"{_LAYER}{source}.down_proj.weight", f"layers.{{layer}}.{target}.down.weight", layers=layers),
    ]


def _router_rules(layers: tuple[int, ...]) -> list[Rule]:
    """The router's matrix, and its bias, which only orders the experts."""
    weight, bias = "layers.{layer}.network.router.weight", "layers.{layer}.network.router.bias"
    return [
        Rule(f"{_LAYER}moe.gate.weight", weight, layers=layers),
        Rule(f"{_LAYER}moe.router_bias", bias, layers=layers),
        Rule(f"{_LAYER}mlp.gate.weight", weight, layers=layers),
        Rule(f"{_LAYER}mlp.gate.e_score_correction_bias", bias, layers=layers),
    ]


def _expert_rules(layer: int, weight_format: str, producer: str) -> list[Rule]:
    """Routed experts of one layer: stacked, expert first, or one tensor for each expert.

    compressed-tensors stores the outer scales of NVFP4 as what a number was multiplied with; the others, and this
    runtime, as what a code is multiplied with.
    """
    layers, experts = (layer,), "layers.{layer}.network.experts."
    if weight_format == PLAIN:
        kinds = [("weight", WEIGHT, False)]
        merged = [
            Rule(f"{_LAYER}mlp.experts.gate_up_proj", f"{experts}gate_up.weight", ("gate", "up"), layers, axis=1),
            Rule(f"{_LAYER}mlp.experts.down_proj", f"{experts}down.weight", layers=layers),
        ]
    else:
        compressed = producer == "compressed-tensors"
        codes = "weight_packed" if compressed and weight_format != "fp8" else "weight"
        kinds, merged = [(codes, WEIGHT, False)], []
        for scale in SCALES[weight_format]:
            name = scale.names[producer]
            kinds.append((name, scale.key, compressed and name.endswith("global_scale")))
    rules = [
        Rule(f"{_LAYER}{stack}{source}.{kind}", f"{experts}{target}.{key}", (piece,), layers, reciprocal=reciprocal)
        for kind, key, reciprocal in kinds
        for source, target, piece in _EXPERT_PIECES
        for stack in ("moe.", "moe.experts.{expert}.", "mlp.experts.{expert}.")
    ]
    return [*rules, *merged]


def _tower_rules(config: VisionConfig) -> list[Rule]:
    """The image tower and its projector, under `vision.`."""
    rules = [
        Rule("vit_large_projector.weight", "vision.projector", part="vision"),
        Rule("multi_modal_projector.weight", "vision.projector", part="vision"),
    ]
    for names in (_TOWER_NAMES, _TOWER_NAMES_SAVED):
        rules += [Rule(f"{_TOWER}{source}", f"vision.{target}", part="vision") for source, target in names.items()]
    layers, block = tuple(range(config.layers)), "vision.blocks.{layer}."
    prefixes = (_TOWER_BLOCK, f"{_TOWER}layers.{{layer}}.")
    for spelling, at in enumerate(prefixes):
        for target, sources in _SCALES.items():
            rules.append(Rule(f"{at}{sources[spelling]}", f"{block}{target}", layers=layers, part="vision"))
        for target, sources in _BLOCK_PARTS.items():
            for part in ("weight", "bias"):
                name = f"{at}{sources[spelling]}.{part}"
                rules.append(Rule(name, f"{block}{target}.{part}", layers=layers, part="vision"))
    for part in ("weight", "bias"):
        target = f"{block}qkv.{part}"
        whole_name = f"{_TOWER_BLOCK}attn.in_proj_{part}"
        rules.append(Rule(whole_name, target, ("q", "k", "v"), layers, part="vision"))
        for piece in ("q", "k", "v"):
            name = f"{prefixes[1]}self_attn.{piece}_proj.{part}"
            # transformers keeps q and k in the order in which it rotates them.
            reorder = None if piece == "v" else pair_heads(config.heads)
            rules.append(Rule(name, target, (piece,), layers, part="vision", reorder=reorder))
    return rules
