"""How the published releases lay out each format: tensor names, config.json, ignore lists.

bf16 and fp8 keep the published names; nvfp4 puts the language model under `model.language_model.` and the image tower
under `model.`, as ModelOpt's export does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from srt import __version__
from srt.configs.quant import FP8_BLOCK, KEY, NVFP4_GROUP, published
from srt.configs.step3p7 import TextConfig
from srt.layers.quant.contract import WEIGHT
from srt.layers.quant.fp8 import BLOCK_SCALE
from srt.layers.quant.nvfp4 import GROUP_SCALE, INPUT_SCALE, MATRIX_SCALE

SUFFIXES = {
    "bf16": {WEIGHT: "weight"},
    "fp8": {WEIGHT: "weight", BLOCK_SCALE: "weight_scale_inv"},
    "nvfp4": {
        WEIGHT: "weight",
        GROUP_SCALE: "weight_scale",
        MATRIX_SCALE: "weight_scale_2",
        INPUT_SCALE: "input_scale",
    },
}
"""Last word of a tensor's name by format and key of the weight format."""
MTP_KEYS = ("num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types")
_TOWER = ("vision_model.", "vit_large_projector")


def output_name(name: str, weight_format: str) -> str:
    """A tensor's or module's name in the new checkpoint."""
    plain = published(name)
    if weight_format != "nvfp4" or plain.startswith("lm_head"):
        return plain
    if plain.startswith(_TOWER):
        return f"model.{plain}"
    return "model.language_model." + plain.removeprefix("model.")


def kv_scale_name(layer: int, kind: str) -> str:
    """The scale of FP8 keys (`k`) or values (`v`) of a layer, as ModelOpt's export names it."""
    return output_name(f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale", "nvfp4")


def output_config(
    config: dict[str, Any], text: TextConfig, weight_format: str, plain_modules: Iterable[str], *, keep_mtp: bool
) -> dict[str, Any]:
    """config.json of the new checkpoint.

    `plain_modules` are the modules that stay as stored, in the published spelling.
    """
    new = {key: value for key, value in config.items() if key != KEY}
    nested = "text_config" in new
    inner = {key: value for key, value in (new["text_config"] if nested else new).items() if key != KEY}
    if not keep_mtp:
        inner = _without_mtp(inner, text)
    new = new | {"text_config": inner} if nested else inner
    section = quant_config(weight_format, plain_modules)
    return new if section is None else new | {KEY: section}


def _without_mtp(text_config: dict[str, Any], text: TextConfig) -> dict[str, Any]:
    """The same without MTP keys, per-layer lists cut to the main layers."""
    total = text.main_layers + len(text.mtp_layers)
    return {
        key: value[: text.main_layers] if isinstance(value, list) and len(value) == total else value
        for key, value in text_config.items()
        if key not in MTP_KEYS
    }


def quant_config(weight_format: str, plain_modules: Iterable[str]) -> dict[str, Any] | None:
    """`quantization_config`; None for plain weights."""
    if weight_format == "bf16":
        return None
    if weight_format == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": FP8_BLOCK,
            "modules_to_not_convert": sorted(plain_modules, key=_natural),
        }
    operand = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_GROUP}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": NVFP4_GROUP,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": operand, "input_activations": operand}},
        "ignore": ignore_patterns(plain_modules),
        "producer": {"name": "srt", "version": __version__},
    }


def hf_quant_config(plain_modules: Iterable[str]) -> dict[str, Any]:
    """`hf_quant_config.json`, which ModelOpt writes beside config.json."""
    return {
        "producer": {"name": "srt", "version": __version__},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": NVFP4_GROUP,
            "exclude_modules": ignore_patterns(plain_modules),
        },
    }


def ignore_patterns(plain_modules: Iterable[str]) -> list[str]:
    """Globs over the new names that cover the plain modules and no routed expert.

    A whole layer is `layers.N.*` with its dot: `layers.1*` would cover layers 10 to 19 too.
    """
    patterns: set[str] = set()
    for module in plain_modules:
        name = output_name(module, "nvfp4")
        layer = re.match(r"(model\.language_model\.layers\.\d+)\.(.+)", name)
        if name.startswith("model.vision_model."):
            patterns.add("model.vision_model*")
        elif layer is None:
            patterns.add(name)
        elif layer[2].startswith(("self_attn.", "share_expert.")):
            patterns.add(f"{layer[1]}.{layer[2].split('.')[0]}*")
        else:
            patterns.add(name if layer[2] == "moe.gate" else f"{layer[1]}.{layer[2].split('.')[0]}*")
    return sorted(patterns, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
