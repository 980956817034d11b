"""What a checkpoint says of its quantisation, what its tensors say, and what happens where the two disagree."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srt.configs.census import expert_formats
from srt.configs.models import read_config, read_facts
from srt.configs.quant import published, read_quant
from srt.configs.section import Section
from srt.errors import StartupError
from tests.support.checkpoints import write_checkpoint
from tests.support.quantised import DIALECTS, quantise

LAYER = "model.layers.2.moe."
Edit = Callable[[dict[str, Any]], object]
EditTensors = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), vision=False, hidden=128, expert_width=256, mtp=1)


def formats(checkpoint: Path) -> dict[int, str]:
    return expert_formats(checkpoint, read_config(checkpoint))


def edit_config(checkpoint: Path, edit: Edit) -> None:
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_tensors(checkpoint: Path, edit: EditTensors) -> None:
    (path,) = checkpoint.glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, str(path))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_format_of_each_layer_is_read_from_the_shards(plain: Path, tmp_path: Path, dialect: str) -> None:
    expected = "fp8" if "fp8" in dialect else "nvfp4-a16" if "a16" in dialect else "nvfp4"
    checkpoint = quantise(plain, tmp_path, dialect)
    assert formats(checkpoint) == dict.fromkeys(range(1, 5), expected)
    facts = read_facts(checkpoint)
    assert facts.experts == expected
    assert {kind.format for kind in facts.weights if kind.part == "routed experts"} == {expected}


def test_a_plain_checkpoint_has_plain_experts(plain: Path) -> None:
    assert formats(plain) == dict.fromkeys(range(1, 5), "plain")
    assert read_facts(plain).experts == "plain"


def test_a_layer_that_was_left_plain_is_read_as_it_is_stored(plain: Path, tmp_path: Path) -> None:
    def restore(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(LAYER + "gate_proj")]:
            del tensors[name]
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for kind in ("weight", "weight_scale_inv"):
                tensors.pop(f"{LAYER}{projection}.{kind}", None)
            tensors[f"{LAYER}{projection}.weight"] = original[f"{LAYER}{projection}.weight"]

    original = load_file(plain / "model.safetensors")
    checkpoint = quantise(plain, tmp_path, "fp8")
    edit_tensors(checkpoint, restore)
    assert formats(checkpoint) == {1: "fp8", 2: "plain", 3: "fp8", 4: "fp8"}


def _drop(name: str) -> EditTensors:
    return lambda tensors: tensors.pop(name)


def _put(name: str, change: Callable[[Tensor], Tensor]) -> EditTensors:
    return lambda tensors: tensors.update({name: change(tensors[name])})


FILE = r"model-00001-of-00001\.safetensors"


@pytest.mark.parametrize(
    ("dialect", "edit", "told"),
    [
        (
            "fp8",
            _drop(LAYER + "up_proj.weight_scale_inv"),
            rf"2\.moe\.up_proj\.weight_scale_inv is missing, \S+up_proj\.weight is in {FILE}",
        ),
        (
            "fp8",
            _put(LAYER + "down_proj.weight_scale_inv", lambda scale: scale[:, :, :1].contiguous()),
            rf"down_proj\.weight_scale_inv in {FILE} has shape \[8, 1, 1\], expected \[8, 1, 2\]",
        ),
        (
            "fp8",
            _put(LAYER + "gate_proj.weight", lambda codes: codes[:, :128].contiguous()),
            rf"gate_proj\.weight in {FILE} has shape \[8, 128, 128\], expected \[8, 256, 128\]",
        ),
        (
            "fp8",
            _put(LAYER + "gate_proj.weight", lambda codes: codes.view(torch.int8)),
            rf"gate_proj\.weight in {FILE} has dtype I8, expected one of BF16, F16, F32, F8_E4M3, U8",
        ),
        (
            "nvfp4",
            _drop("model.language_model.layers.2.moe.down_proj.weight_scale_2"),
            r"2\.moe\.down_proj\.weight_scale_2 is missing",
        ),
        (
            "nvfp4",
            _put("model.language_model.layers.2.moe.down_proj.weight_scale", lambda scale: scale.view(torch.uint8)),
            rf"down_proj\.weight_scale in {FILE} has dtype U8, expected F8_E4M3",
        ),
        (
            "nvfp4",
            _drop("model.language_model.layers.2.moe.down_proj.input_scale"),
            r"2\.moe\.down_proj\.input_scale is missing",
        ),
        (
            "compressed-nvfp4",
            _drop("model.layers.2.moe.experts.5.up_proj.weight_global_scale"),
            r"2\.moe\.experts\.5\.up_proj\.weight_global_scale is missing",
        ),
        (
            "fp8",
            _put("model.layers.1.self_attn.q_proj.weight", lambda weight: weight.to(torch.float8_e4m3fn)),
            rf"1\.self_attn\.q_proj\.weight in {FILE} has dtype F8_E4M3: only routed experts may be quantised",
        ),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said_with_its_name_and_file(
    plain: Path, tmp_path: Path, dialect: str, edit: EditTensors, told: str
) -> None:
    checkpoint = quantise(plain, tmp_path, dialect)
    edit_tensors(checkpoint, edit)
    began = time.process_time()  # of this process: others may keep it waiting
    with pytest.raises(StartupError, match=told):
        read_facts(checkpoint)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    ("dialect", "edit", "told"),
    [
        (
            "fp8",
            lambda c: c.pop("quantization_config"),
            rf"weight in {FILE} has dtype F8_E4M3, but config\.json has no quantization_config",
        ),
        (
            "fp8",
            lambda c: c["quantization_config"].update(weight_block_size=[64, 64]),
            r"weight_block_size is \[64, 64\], it must be \[128, 128\]",
        ),
        ("fp8", lambda c: c["quantization_config"].pop("weight_block_size"), "lacks weight_block_size"),
        ("fp8", lambda c: c["quantization_config"].update(activation_scheme="static"), "activation_scheme is 'static'"),
        (
            "fp8",
            lambda c: c.update(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            r"has dtype F8_E4M3, but config\.json says nvfp4",
        ),
        (
            "fp8",
            lambda c: c["quantization_config"].update(modules_to_not_convert=["model.layers.2.moe.up_proj"]),
            r"2\.moe\.up_proj\.weight in \S+ has dtype F8_E4M3, but config\.json lists \S+ as not quantised",
        ),
        ("nvfp4", lambda c: c["quantization_config"].update(quant_algo="FP8"), "quant_algo is 'FP8', it must be NVFP4"),
        ("nvfp4", lambda c: c["quantization_config"].update(group_size=32), "group_size is 32, it must be 16"),
        (
            "compressed-nvfp4",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(strategy="channel"),
            "is '4-bit float, channel', it must be 8-bit float with strategy block, or",
        ),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    plain: Path, tmp_path: Path, dialect: str, edit: Edit, told: str
) -> None:
    checkpoint = quantise(plain, tmp_path, dialect)
    edit_config(checkpoint, edit)
    with pytest.raises(StartupError, match=told):
        read_facts(checkpoint)


def test_a_config_that_promises_codes_where_all_experts_are_plain_is_refused(plain: Path, tmp_path: Path) -> None:
    checkpoint = quantise(plain, tmp_path, "fp8")
    (checkpoint / "model-00001-of-00001.safetensors").unlink()
    save_file(load_file(plain / "model.safetensors"), str(checkpoint / "model.safetensors"))
    with pytest.raises(StartupError, match="says that routed experts are stored in fp8, all of them are plain"):
        read_facts(checkpoint)


def test_a_shard_that_was_cut_short_is_named(plain: Path, tmp_path: Path) -> None:
    checkpoint = quantise(plain, tmp_path, "nvfp4", shards=3)
    victim = checkpoint / "model-00002-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(StartupError, match=r"model-00002-of-00003\.safetensors is cut short"):
        read_facts(checkpoint)


def test_two_descriptions_that_differ_are_refused() -> None:
    config = Section({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "config.json")
    told = Section({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, "hf_quant_config.json")
    with pytest.raises(StartupError, match=r"says fp8, hf_quant_config\.json says nvfp4"):
        read_quant(config, told)


def test_patterns_are_read_in_the_published_spelling() -> None:
    ignore = ["model.language_model.layers.0*", r"re:model\.language_model\..*self_attn.*", "lm_head"]
    values = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore}
    quant = read_quant(Section({"quantization_config": values}, "config.json"), None)
    assert quant is not None
    assert quant.ignores("model.layers.0.mlp.up_proj")
    assert quant.ignores("model.layers.7.self_attn.q_proj")
    assert quant.ignores("lm_head")
    assert not quant.ignores("model.layers.7.moe.up_proj")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.3.moe.up_proj.weight", "model.layers.3.moe.up_proj.weight"),
        ("model.vision_model.conv1.weight", "vision_model.conv1.weight"),
        ("model.vit_large_projector.weight", "vit_large_projector.weight"),
        ("model.layers.3.moe.up_proj.weight", "model.layers.3.moe.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_name_with_the_outer_prefix_becomes_the_published_one(name: str, expected: str) -> None:
    assert published(name) == expected
