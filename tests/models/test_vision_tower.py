"""The image tower against published numbers and against transformers, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from srt.configs.census import announced_formats
from srt.configs.models import read_config, read_facts
from srt.layers.parameter import nested
from srt.models.step3p7_vision import VisionTower, axial_rotation
from srt.models.step3p7_weights import step3p7_rules
from srt.tokenizer.images import make_views
from srt.weights.files import Item, Listed, Shards
from srt.weights.load import load
from tests.support.checkpoints import write_checkpoint, write_golden
from tests.support.pictures import ROOMY, STEP, file_of, picture
from tests.tokenizer.test_layout import EXAMPLES

ROUNDING = 6e-6
"""The vectors are printed with five decimals."""
RELATIVE = 1e-5

GLOBAL = [(-0.46904, 0.84367, 1.46481), (-0.71671, 0.28936, -0.52284), (0.42520, 1.82892, 2.95194),
          (0.31977, 0.40382, -0.32734)]  # fmt: skip
SECOND_CROP = [(-2.38320, 1.18284, 1.50659), (0.76762, -1.43934, -0.16382), (-0.26820, 1.74497, 0.34763),
               (2.38901, -0.45544, -2.20516)]  # fmt: skip


def load_tower(checkpoint: Path, dtype: torch.dtype = torch.float32) -> VisionTower:
    config, facts = read_config(checkpoint), read_facts(checkpoint)
    assert config.vision is not None
    assert facts.images is not None
    tower = VisionTower(config.vision, facts.images, config.text.hidden_size, dtype)
    book = step3p7_rules(config, announced_formats(config), tower=True)
    parameters = nested("vision", tower.parameters())
    kept = [rule for rule in book.rules if rule.part == "vision"]
    load(parameters, type(book)(kept, book.prefixes), OnlyVision(checkpoint), lambda done, total: None)
    return tower


class OnlyVision(Shards):
    """The tensors of the tower; the language model has tests of its own."""

    def names(self) -> list[Listed]:
        return [listed for listed in super().names() if is_vision(listed.name)]

    def items(self) -> Iterator[Item]:
        return (item for item in super().items() if is_vision(item.name))


def is_vision(name: str) -> bool:
    return "vision" in name or "projector" in name


def golden_pixels(count: int, side: int, offset: int) -> Tensor:
    """[N, S, S, 3] of the published formula, which walks over [N, 3, S, S]."""
    at = torch.arange(count * 3 * side * side, dtype=torch.int64)
    values = 2 * (((31 * at * at + 7919 * at + offset) % 65521).double() / 65521 - 0.5)
    return values.float().view(count, 3, side, side).permute(0, 2, 3, 1).contiguous()


def noise(count: int, side: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("nano"), "nano", vision_layers=2, mtp=0)


@pytest.fixture(scope="module")
def truth(nano: Path) -> Any:
    from transformers import Step3p7ForConditionalGeneration

    torch.set_num_threads(1)
    return Step3p7ForConditionalGeneration.from_pretrained(str(nano), dtype=torch.float32)


def reference(truth: Any, views: Tensor) -> Tensor:
    """Features of views of one size, by transformers."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    pixels = (views.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.inference_mode():
        hidden = truth.model.vision_model(pixels).last_hidden_state
        features: Tensor = truth.model.multi_modal_projector(hidden)
    return features


def assert_close(features: Tensor, expected: Tensor) -> None:
    assert features.shape == expected.shape
    difference = ((features - expected).abs().max() / expected.abs().max()).item()
    assert difference < RELATIVE, f"relative difference {difference:.2e}"


def test_features_of_the_global_view_and_of_crops_are_the_published_ones(tmp_path: Path) -> None:
    tower = load_tower(write_golden(tmp_path))
    with torch.inference_mode():
        view = tower.features(golden_pixels(1, 112, 1))
        crops = tower.features(golden_pixels(2, 84, 2))
    assert torch.allclose(view[0, :, :3], torch.tensor(GLOBAL), atol=ROUNDING)
    assert torch.allclose(crops[1, :, :3], torch.tensor(SECOND_CROP), atol=ROUNDING)


@pytest.mark.parametrize(("side", "tokens"), [(728, 169), (504, 81)])
def test_features_of_both_view_sizes_equal_hugging_face(nano: Path, truth: Any, side: int, tokens: int) -> None:
    views = noise(2, side, side)
    with torch.inference_mode():
        features = load_tower(nano).encode(views)
    assert features.shape[1] == tokens
    assert_close(features, reference(truth, views))


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views as published, one narrow block: 91 crops are seen below."""
    directory = tmp_path_factory.mktemp("thin")
    return write_checkpoint(
        directory, "nano", mtp=0, vision_width=32, vision_heads=2, vision_mlp=64, vision_layers=1, layers=2
    )


@pytest.fixture(scope="module")
def thin_truth(thin: Path) -> Any:
    from transformers import Step3p7ForConditionalGeneration

    torch.set_num_threads(1)
    return Step3p7ForConditionalGeneration.from_pretrained(str(thin), dtype=torch.float32)


@pytest.mark.parametrize(("width", "height", "crops", "row_ends", "tokens"), EXAMPLES)
def test_features_of_every_worked_example_equal_hugging_face(
    thin: Path, thin_truth: Any, width: int, height: int, crops: int, row_ends: int, tokens: int
) -> None:
    made = make_views(file_of(picture(width, height)), STEP, ROOMY, "vendor")
    tower = load_tower(thin)
    features = 0
    for views in (torch.from_numpy(made.crops), torch.from_numpy(made.view.copy())):
        for start in range(0, len(views), 8):
            some = views[start : start + 8]
            with torch.inference_mode():
                encoded = tower.encode(some)
            assert_close(encoded, reference(thin_truth, some))
            features += encoded.shape[0] * encoded.shape[1]
    assert features == tokens - 2 * (crops + 1) - row_ends


def test_names_of_transformers_load_to_the_same_tower(nano: Path, truth: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    truth.config.to_json_file(str(tmp_path / "config.json"), use_diff=False)
    tensors = {name: tensor.contiguous() for name, tensor in truth.state_dict().items()}
    save_file(tensors, str(tmp_path / "a.safetensors"))
    views = noise(1, 504, 3)
    with torch.inference_mode():
        assert torch.equal(load_tower(tmp_path).encode(views), load_tower(nano).encode(views))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_view_has_the_same_bits_of_features_in_any_batch(nano: Path, dtype: torch.dtype) -> None:
    tower, views = load_tower(nano, dtype), noise(5, 504, 8)
    with torch.inference_mode():
        together = tower.encode(views)
        alone = torch.cat([tower.encode(views[at : at + 1]) for at in range(5)])
    assert torch.equal(together, alone)


def test_bfloat16_features_stay_close_to_float32(nano: Path) -> None:
    views = noise(1, 728, 5)
    with torch.inference_mode():
        exact = load_tower(nano).encode(views)
        rounded = load_tower(nano, torch.bfloat16).encode(views)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_rotation_frequencies_of_the_published_tower() -> None:
    angles = axial_rotation(52, 96).angle()
    expected = torch.tensor([1.0, 0.6812921, 0.4641589])
    assert torch.allclose(angles[1, 0, :3], expected, atol=1e-6), "column 1 of row 0 turns the first half"
    assert torch.count_nonzero(angles[1, 0, 24:]) == 0
    assert torch.allclose(angles[52, 0, 24:27], expected, atol=1e-6), "row 1 turns the second half"
    assert angles[1, 0, 23].item() == pytest.approx(1.4678e-4, rel=1e-4)
