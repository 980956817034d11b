"""Reading config.json: two spellings, lists of two lengths, and a clear error for everything that is not served."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srt.configs.models import read_config, read_facts
from srt.configs.step3p7 import Llama3Scaling, RopeConfig, Step3p7Config, part_of
from srt.errors import StartupError
from tests.support.checkpoints import PRESETS, hub_config, text_shapes, vision_shapes, write_checkpoint

IDS = {"<|bos|>": 0, "<|eos|>": 1, "<|im_end|>": 1017, "<|pad|>": 2, "<im_patch>": 1019}
Edit = Callable[[dict[str, Any]], object]


def config(*, vision: bool = False, **changes: Any) -> dict[str, Any]:
    return hub_config(replace(PRESETS["tiny"], **changes), IDS, vision=vision, dtype=torch.bfloat16)


def read(directory: Path, values: dict[str, Any]) -> Step3p7Config:
    (directory / "config.json").write_text(json.dumps(values))
    return read_config(directory)


def test_the_published_spelling_is_read(tmp_path: Path) -> None:
    text = read(tmp_path, config()).text
    assert text.main_layers == 5
    assert [layer.index for layer in text.mtp_layers] == [5, 6, 7]
    full, sliding, clamped, draft = (*text.layers[:2], text.layers[4], text.mtp_layers[0])
    assert (full.q_heads, full.kv_heads, full.window, full.routed) == (4, 2, None, False)
    assert full.rope == RopeConfig(5_000_000.0, 8, Llama3Scaling(2.0, 1.0, 32.0, 256))
    assert (sliding.q_heads, sliding.kv_heads, sliding.window, sliding.routed) == (6, 2, 24, True)
    assert sliding.rope == RopeConfig(10_000.0, 16, None)
    assert (full.limit, full.shared_limit, clamped.limit, clamped.shared_limit) == (None, None, 7.0, 16.0)
    assert (draft.q_heads, draft.window, draft.routed, draft.limit) == (6, 24, False, None)
    assert [(group.name, group.layers, group.window) for group in text.kv_groups()] == [
        ("full", (0, 4), None),
        ("sliding", (1, 2, 3), 24),
    ]


def test_what_transformers_saves_means_the_same(tmp_path: Path) -> None:
    from transformers import Step3p7Config as TransformersConfig

    published = config(vision=True)
    ours = read(tmp_path, published)
    saved = TransformersConfig(**json.loads(json.dumps(published)))
    saved.architectures = published["architectures"]
    assert "moe_layers_enum" not in saved.to_dict()["text_config"]
    assert read(tmp_path, json.loads(saved.to_json_string(use_diff=False))) == ours


def test_lists_without_mtp_entries_leave_plain_sliding_draft_layers(tmp_path: Path) -> None:
    values = config()
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        values[name] = values[name][:5]
    assert read(tmp_path, values) == read(tmp_path, config())


def test_one_theta_may_stand_for_all_layers(tmp_path: Path) -> None:
    layers = read(tmp_path, config() | {"rope_theta": 500_000}).text.layers
    assert {layer.rope.theta for layer in layers} == {500_000.0}


@pytest.mark.parametrize("spelling", ["1,2,3,4", " 1, 2,3,4,", [1, 2, 3, 4]])
def test_moe_layers_may_be_a_string_or_a_list(tmp_path: Path, spelling: object) -> None:
    layers = read(tmp_path, config() | {"moe_layers_enum": spelling}).text.layers
    assert [layer.routed for layer in layers] == [False, True, True, True, True]


def test_moe_layers_that_are_not_listed_follow_from_offset_and_stride(tmp_path: Path) -> None:
    values = config() | {"moe_layers_enum": None, "moe_layer_offset": 1, "moe_every_n_layer": 2}
    text = read(tmp_path, values).text
    assert [layer.routed for layer in text.layers + text.mtp_layers] == [False, True, False, True, *[False] * 4]


@pytest.mark.parametrize("none", [0, 0.0, None])
def test_a_limit_of_zero_or_null_is_no_clamp(tmp_path: Path, none: object) -> None:
    layers = read(tmp_path, config() | {"swiglu_limits": [none] * 4 + [7]}).text.layers
    assert [layer.limit for layer in layers] == [None, None, None, None, 7.0]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c.pop("hidden_size"), "config.json lacks hidden_size"),
        (lambda c: c.pop("moe_top_k"), r"config.json lacks moe_top_k \(or num_experts_per_tok\)"),
        (lambda c: c.pop("rope_theta"), "config.json lacks rope_theta"),
        (lambda c: c.update(hidden_size="64"), "config.json.hidden_size is '64', it must be a whole number"),
        (lambda c: c.update(hidden_size=0), "config.json.hidden_size is 0, it must be a whole number of at least 1"),
        (lambda c: c.update(rms_norm_eps=-1), "config.json.rms_norm_eps is -1, it must be a number above 0"),
        (lambda c: c.update(rms_norm_eps=float("nan")), "rms_norm_eps is nan, it must be a number above 0"),
        (lambda c: c.update(rope_theta=[-1.0] * 5), "it must be a number above 0 or a list of them"),
        (lambda c: c.update(moe_top_k=99), "moe_top_k is 99, it must be at most the number of experts"),
        (lambda c: c.update(sink=True), "config.json.sink is True, it must be False, the only value"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (lambda c: c.update(use_rope_layers=[1]), "use_rope_layers is"),
        (lambda c: c.update(layer_types=["full_attention"] * 6), "has 6 entries, it must have 5 or, with MTP, 8"),
        (lambda c: c.update(layer_types=["linear"] * 5), "'linear', it must be one of full_attention"),
        (lambda c: c.update(moe_layers_enum="1,x"), "moe_layers_enum is '1,x', it must be a whole number or a list"),
        (lambda c: c.update(moe_layers_enum="1,9"), "moe_layers_enum is 9, it must be a layer number below 8"),
        (lambda c: c["rope_scaling"].update(rope_type="yarn"), "'yarn', it must be llama3 or default"),
        (lambda c: c["attention_other_setting"].update(head_dim=8), "attention_other_setting.head_dim is 8"),
        (lambda c: c.update(torch_dtype="int8"), "config.json.dtype is 'int8', it must be one of bfloat16"),
        (lambda c: c.update(quantization_config={"quant_method": "awq"}), "quant_method is 'awq', it must be one of"),
        (lambda c: c.update(model_type="llama"), "model_type is 'llama', supported are step3p5, step3p7"),
        (lambda c: c.update(architectures=None), "lacks architectures"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_key_and_value(tmp_path: Path, edit: Edit, told: str) -> None:
    values = config()
    edit(values)
    with pytest.raises(StartupError, match=told):
        read(tmp_path, values)


def test_a_vision_config_with_another_tower_is_refused(tmp_path: Path) -> None:
    values = config(vision=True)
    values["vision_config"]["use_cls_token"] = True
    with pytest.raises(StartupError, match=r"vision_config\.use_cls_token is True"):
        read(tmp_path, values)


def test_facts_count_bytes_by_part_and_gather_all_end_ids(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    facts = read_facts(tmp_path)
    geometry = PRESETS["tiny"]
    parameters = sum(torch.Size(shape).numel() for shape in vision_shapes(geometry).values())
    assert facts.weight_bytes["vision"] == 2 * parameters
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 0 < on_disk - sum(facts.weight_bytes.values()) < 64 * 1024
    assert facts.eos_token_ids[:2] == (1, facts.eos_token_ids[1])
    assert 7 in facts.eos_token_ids
    assert (facts.bos_token_id, facts.has_vision, facts.mtp_modules, facts.dtype) == (0, True, 3, "bfloat16")


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, -7]}')
    with pytest.raises(StartupError, match="names the special token -7; its vocabulary has"):
        read_facts(tmp_path)


def test_a_release_without_mtp_tensors_has_no_mtp_modules(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, mtp=0)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["num_nextn_predict_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(values))
    facts = read_facts(tmp_path)
    assert (facts.mtp_modules, facts.weight_bytes["mtp"]) == (0, 0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.4.mlp.up_proj.weight", "text"),
        ("model.language_model.layers.5.eh_proj.weight", "mtp"),
        ("lm_head.weight", "text"),
        ("model.vision_model.layers.7.mlp.fc1.weight", "vision"),
        ("model.multi_modal_projector.weight", "vision"),
        ("vit_large_projector.weight", "vision"),
    ],
)
def test_parts_are_told_apart_by_name(name: str, part: str) -> None:
    assert part_of(name, main_layers=5) == part


def test_all_text_tensors_of_a_checkpoint_are_text_or_mtp() -> None:
    parts = {part_of(name, 5) for name in text_shapes(PRESETS["tiny"])}
    assert parts == {"text", "mtp"}


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"abc", "not a safetensors file"), (b"\x02" + b"\0" * 7 + b"{]", "damaged header")],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, content: bytes, told: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(StartupError, match=rf"model\.safetensors.*{told}"):
        read_facts(tmp_path)


def test_a_shard_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StartupError, match="cut short"):
        read_facts(tmp_path)


def test_a_directory_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"has no config\.json"):
        read_facts(tmp_path)
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartupError, match=r"holds no \*\.safetensors"):
        read_facts(tmp_path)
    assert read_facts(tmp_path, with_weights=False).weight_bytes == {"text": 0, "mtp": 0, "vision": 0}
