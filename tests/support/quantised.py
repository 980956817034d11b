"""Quantised checkpoints in every dialect, made from a plain one; and the plain one that they stand for.

Written without the converter: the dialects' names and conventions stand here a second time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srt.layers.quant.contract import WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import INPUT_SCALE, Nvfp4

DIALECTS = ("fp8", "fp8-experts", "compressed-fp8", "nvfp4", "nvfp4-experts", "compressed-nvfp4",
            "compressed-nvfp4-a16")  # fmt: skip
"""Formats as the published releases store them, the same with a tensor for each expert, and compressed-tensors."""
EXPERT = re.compile(r"(model\.layers\.\d+\.moe\.)((?:gate|up|down)_proj)\.weight")
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*share_expert.*", r"re:.*\.moe\.gate$", "re:vision_model.*"]


def weight_format(dialect: str) -> WeightFormat:
    """The format of a dialect's experts."""
    return Fp8Blocks() if "fp8" in dialect else Nvfp4(inputs="a16" not in dialect)


def quantise(source: Path, target: Path, dialect: str, *, shards: int = 1) -> Path:
    """Write the checkpoint `source` with its routed experts in a dialect; returns `target`."""
    _copy(source, target)
    plain = load_file(source / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            tensors[_prefixed(name, dialect)] = tensor
        else:
            tensors |= dict(_expert_tensors(match[1], match[2], tensor, dialect))
    _write_shards(target, tensors, shards)
    _write_config(target, dialect)
    return target


def dequantise(source: Path, target: Path, dialect: str) -> Path:
    """Write in float32 what the experts of `quantise(source, .., dialect)` stand for; returns `target`."""
    _copy(source, target)
    tensors = load_file(source / "model.safetensors")
    weights = weight_format(dialect)
    for name, tensor in tensors.items():
        tensors[name] = weights.unpack(weights.pack(tensor)) if EXPERT.fullmatch(name) else tensor.float()
    save_file(tensors, str(target / "model.safetensors"))
    config = json.loads((target / "config.json").read_text())
    for section in (config, config.get("text_config", {})):
        if "torch_dtype" in section:
            section["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config))
    return target


def input_scale(layer_prefix: str, projection: str, experts: int) -> Tensor:
    """Scales of activations, [E]; they differ between experts and between gate and up."""
    seed = sum(map(ord, layer_prefix + projection))
    return 0.0005 + 0.001 * torch.rand(experts, generator=torch.Generator().manual_seed(seed))


def _expert_tensors(at: str, projection: str, tensor: Tensor, dialect: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one projection of all experts."""
    stored = dict(weight_format(dialect).pack(tensor).tensors)
    if INPUT_SCALE in stored:
        stored[INPUT_SCALE] = input_scale(at, projection, len(tensor))[:, None]
    for key, value in stored.items():
        suffix, converted = _convert(key, value, dialect)
        if dialect in ("fp8", "nvfp4"):
            yield _prefixed(f"{at}{projection}.{suffix}", dialect), converted.contiguous()
            continue
        for expert, one in enumerate(converted):
            part = one.reshape(1) if "compressed" in dialect and one.dim() == 0 else one
            yield _prefixed(f"{at}experts.{expert}.{projection}.{suffix}", dialect), part.clone()


def _convert(key: str, value: Tensor, dialect: str) -> tuple[str, Tensor]:
    """A tensor's name and bytes in a dialect."""
    if "fp8" in dialect:
        return {"weight": "weight"}.get(key, "weight_scale" if "compressed" in dialect else "weight_scale_inv"), value
    value = value.squeeze(1) if key in ("matrix_scale", INPUT_SCALE) else value
    if "compressed" not in dialect:
        names = {"group_scale": "weight_scale", "matrix_scale": "weight_scale_2"}
        return names.get(key, key), value
    if key in ("matrix_scale", INPUT_SCALE):
        return ("weight_global_scale" if key == "matrix_scale" else "input_global_scale"), 1 / value
    return {"weight": "weight_packed", "group_scale": "weight_scale"}[key], value


def _prefixed(name: str, dialect: str) -> str:
    if not dialect.startswith("nvfp4") or name.startswith("lm_head"):
        return name
    return "model.language_model." + name[6:] if name.startswith("model.") else f"model.{name}"


def _write_config(target: Path, dialect: str) -> None:
    config = json.loads((target / "config.json").read_text())
    if dialect.startswith("nvfp4"):
        ignore = ["lm_head", "model.language_model.layers.0*", "model.language_model.layers.*.self_attn*",
                  "model.language_model.layers.*.share_expert*", "model.vision_model*"]  # fmt: skip
        quant: dict[str, Any] = {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignore,
            "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        }  # fmt: skip
        inner = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ignore}
        (target / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    elif "compressed" in dialect:
        quant = {"quant_method": "compressed-tensors", "config_groups": {"group_0": _group(dialect)}, "ignore": IGNORED}
    else:
        quant = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3",
                 "modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]}  # fmt: skip
    config["quantization_config"] = quant
    (target / "config.json").write_text(json.dumps(config))


def _group(dialect: str) -> dict[str, Any]:
    common = {"type": "float", "symmetric": True}
    if "fp8" in dialect:
        weights = common | {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
        return {"weights": weights, "input_activations": common | {"num_bits": 8, "dynamic": True}}
    weights = common | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    inputs = None if "a16" in dialect else weights | {"dynamic": "local"}
    return {"weights": weights, "input_activations": inputs}


def _write_shards(target: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, str(target / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"))


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target / path.name)
