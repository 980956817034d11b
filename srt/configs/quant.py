"""What a checkpoint says about its own quantisation: config.json's `quantization_config` and `hf_quant_config.json`.

Three producers are read: the published FP8 release (`fp8`), ModelOpt (`modelopt`) and compressed-tensors. What is
stored is decided by the tensors (`srt/configs/census.py`); this page says how they must be read.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from srt.configs.section import Section
from srt.errors import StartupError

PREFIXES: Final = {
    "model.language_model.": "model.",
    "model.vision_model": "vision_model",
    "model.vit_large_projector": "vit_large_projector",
    "model.multi_modal_projector": "multi_modal_projector",
}
"""Beginnings of tensor names and of patterns over them -> how the published BF16 release spells them."""
FP8_BLOCK: Final = [128, 128]
NVFP4_GROUP: Final = 16
KEY: Final = "quantization_config"


class QuantConfig(msgspec.Struct, frozen=True):
    """How quantised modules are stored, and which modules are left alone."""

    producer: str
    """`fp8`, `modelopt` or `compressed-tensors`: whose tensor names are used."""
    format: str
    """`fp8`, `nvfp4` or `nvfp4-a16` (weights only)."""
    ignored: tuple[str, ...]
    """Patterns over module names, in the published spelling: a name, a glob, or `re:` and an expression."""
    kv_scales: bool
    """The checkpoint announces scales for keys and values in FP8."""

    def ignores(self, module: str) -> bool:
        """Whether a pattern names this module exactly or by a wildcard."""
        return any(_matches(pattern, module) for pattern in self.ignored)


def published(name: str) -> str:
    """A name in the spelling of the published BF16 release."""
    for prefix, replacement in PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def read_quant(config: Section, hf_quant_config: Section | None) -> QuantConfig | None:
    """The checkpoint's quantisation; None if it has none.

    Raises: StartupError that names the key and value of anything that is not supported, and if the two files differ.
    """
    section = config.maybe_section(KEY)
    if section is None:
        nested = config.maybe_section("text_config")
        section = nested.maybe_section(KEY) if nested is not None else None
    told = _read_hf_quant(hf_quant_config.section("quantization")) if hf_quant_config is not None else None
    if section is None:
        return told
    method = section.text("quant_method")
    readers = {"fp8": _read_fp8, "modelopt": _read_modelopt, "compressed-tensors": _read_compressed}
    reader = readers.get("modelopt" if method.startswith("modelopt") else method)
    if reader is None:
        raise section.wrong("quant_method", method, f"one of {', '.join(readers)}")
    found = reader(section)
    if told is None:
        return found
    if told.format != found.format:
        raise StartupError(
            f"{section.where} says {found.format}, hf_quant_config.json says {told.format}: they must agree"
        )
    ignored = tuple(dict.fromkeys(found.ignored + told.ignored))
    return msgspec.structs.replace(found, ignored=ignored, kv_scales=found.kv_scales or told.kv_scales)


def _read_fp8(section: Section) -> QuantConfig:
    section.demand("weight_block_size", FP8_BLOCK)
    if "weight_block_size" not in section:
        raise StartupError(f"{section.where} lacks weight_block_size: FP8 with one scale a tensor is not supported")
    section.demand("activation_scheme", "dynamic")
    section.demand("fmt", "e4m3")
    return QuantConfig("fp8", "fp8", _patterns(section, "modules_to_not_convert"), kv_scales=False)


def _read_modelopt(section: Section) -> QuantConfig:
    algorithm = section.text("quant_algo")
    if algorithm != "NVFP4":
        raise section.wrong("quant_algo", algorithm, "NVFP4")
    section.demand("group_size", NVFP4_GROUP)
    groups = section.maybe_section("config_groups")
    for name in groups.names() if groups is not None else ():
        weights = groups.section(name).maybe_section("weights") if groups is not None else None
        if weights is not None:
            weights.demand("group_size", NVFP4_GROUP)
    ignored = _patterns(section, "ignore") + _patterns(section, "exclude_modules")
    return QuantConfig("modelopt", "nvfp4", ignored, kv_scales=section.maybe_section("kv_cache_scheme") is not None)


def _read_hf_quant(section: Section) -> QuantConfig:
    algorithm = section.text("quant_algo")
    if algorithm != "NVFP4":
        raise section.wrong("quant_algo", algorithm, "NVFP4")
    section.demand("group_size", NVFP4_GROUP)
    kv = section.text("kv_cache_quant_algo", default="none")
    return QuantConfig("modelopt", "nvfp4", _patterns(section, "exclude_modules"), kv_scales=kv != "none")


def _read_compressed(section: Section) -> QuantConfig:
    groups = section.section("config_groups")
    formats = {_compressed_format(groups.section(name)) for name in groups.names()}
    if len(formats) != 1:
        raise section.wrong("config_groups", sorted(formats), "groups of one format")
    kv = section.maybe_section("kv_cache_scheme") is not None
    return QuantConfig("compressed-tensors", formats.pop(), _patterns(section, "ignore"), kv_scales=kv)


def _compressed_format(group: Section) -> str:
    """The format of one entry of `config_groups`."""
    weights, inputs = group.section("weights"), group.maybe_section("input_activations")
    bits, kind = weights.integer("num_bits"), weights.text("type")
    strategy = weights.text("strategy")
    weights.demand("symmetric", True)
    if (bits, kind, strategy) == (8, "float", "block"):
        weights.demand("block_structure", FP8_BLOCK)
        return "fp8"
    if (bits, kind, strategy) == (4, "float", "tensor_group"):
        weights.demand("group_size", NVFP4_GROUP)
        return "nvfp4" if inputs is not None and inputs.raw("dynamic") is not True else "nvfp4-a16"
    supported = "8-bit float with strategy block, or 4-bit float with strategy tensor_group"
    raise weights.wrong("strategy", f"{bits}-bit {kind}, {strategy}", supported)


def _patterns(section: Section, key: str) -> tuple[str, ...]:
    found = []
    for pattern in section.texts(key) or []:
        if pattern.startswith("re:"):
            body = pattern[3:]
            for prefix, replacement in PREFIXES.items():
                body = body.replace(re.escape(prefix), re.escape(replacement)).replace(prefix, replacement)
            found.append("re:" + body)
        else:
            found.append(published(pattern))
    return tuple(found)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(pattern + ".") or fnmatchcase(module, pattern)
