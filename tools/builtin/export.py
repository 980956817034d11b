"""Writes the model as a checkpoint directory in the hub's layout, and reads it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.builtin import text
from tools.builtin.model import Model
from tools.builtin.preprocess import CROP_SIDE, GLOBAL_SIDE, MEAN, SIDE_MAX, STD
from tools.builtin.shape import Shape, VisionShape, config

BYTES_MAX: Final = 16_000_000


def rounded(model: Model) -> dict[str, Tensor]:
    """Return the tensors as stored: bfloat16, except the router's bias, which stays a wide copy of one."""
    tensors = {}
    for name, value in model.state_dict().items():
        stored = value.detach().to(torch.bfloat16).cpu().contiguous()
        tensors[name] = stored.float() if name.endswith("router_bias") else stored
    return tensors


def round_in_place(model: Model) -> None:
    """Give the model the values that its checkpoint holds."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value.to(torch.bfloat16).to(value.dtype))


def export(model: Model, out: Path) -> int:
    """Write the directory and return its size in bytes. Raises: ValueError if it is too large."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    tokenizer = text.build_tokenizer()
    ids = text.token_ids(tokenizer)
    save_file(rounded(model), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    shutil.copyfile(text.TEMPLATE_FILE, out / "chat_template.jinja")
    settings = config(model.shape, ids)
    _write(out / "config.json", settings)
    _write(
        out / "generation_config.json",
        {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False},
    )
    _write(out / "preprocessor_config.json", _preprocessor())
    _write(out / "tokenizer_config.json", _tokenizer_config(model.shape, ids))
    for path in out.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in out.iterdir())
    if size > BYTES_MAX:
        raise ValueError(f"the checkpoint has {size} bytes, the limit is {BYTES_MAX}")
    return size


def load_model(path: Path) -> Model:
    """Read a checkpoint directory back into the training model, in float32."""
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model = Model(shape_of(settings))
    tensors = {name: value.float() for name, value in load_file(path / "model.safetensors").items()}
    model.load_state_dict(tensors)
    return model


def shape_of(settings: dict[str, Any]) -> Shape:
    """Return the sizes that a config.json of this project states."""
    inner, outer = settings["text_config"], settings["vision_config"]
    layers = inner["num_hidden_layers"]
    return Shape(
        vocabulary=inner["vocab_size"],
        hidden=inner["hidden_size"],
        layers=layers,
        modules=inner["num_nextn_predict_layers"],
        dense_layers=layers - len(inner["moe_layers_enum"].split(",")),
        intermediate=inner["intermediate_size"],
        heads=inner["num_attention_heads"],
        sliding_heads=inner["attention_other_setting"]["num_attention_heads"],
        kv_heads=inner["num_attention_groups"],
        head_dim=inner["head_dim"],
        window=inner["sliding_window"],
        experts=inner["moe_num_experts"],
        chosen=inner["moe_top_k"],
        expert_width=inner["moe_intermediate_size"],
        shared_width=inner["share_expert_dim"],
        limit=max(inner["swiglu_limits"]),
        shared_limit=max(inner["swiglu_limits_shared"]),
        context=inner["max_position_embeddings"],
        vision=VisionShape(outer["width"], outer["layers"], outer["heads"], outer["mlp_ratio"]),
    )


def _preprocessor() -> dict[str, Any]:
    return {
        "image_processor_type": "Step3p7ImageProcessor",
        "processor_class": "Step3p7Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": GLOBAL_SIDE, "width": GLOBAL_SIDE},
        "patch_size": CROP_SIDE,
        "max_image_size": SIDE_MAX,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "vision_patch_size": 14,
        "downsampler_stride": 4,
    }


def _tokenizer_config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    added = {
        str(index): {
            "content": content,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": False,
            "special": content in text.SPECIAL,
        }
        for content, index in ids.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text.BOS,
        "eos_token": text.TURN_END,
        "pad_token": text.PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
        "added_tokens_decoder": added,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
