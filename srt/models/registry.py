"""Model families by `model_type`: how to build one and how its checkpoint maps onto it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from srt.configs.plan import ImageConfig
from srt.configs.step3p7 import Step3p7Config
from srt.layers.embedding import Embedding
from srt.layers.toolkit import Toolkit
from srt.models.contract import DraftModel, ImageEncoder, LanguageModel
from srt.models.step3p7_mtp import Step3p7Mtp
from srt.models.step3p7_text import Step3p7Text
from srt.models.step3p7_vision import VisionTower
from srt.models.step3p7_weights import step3p7_rules
from srt.weights.rules import RuleBook


@dataclass(frozen=True)
class Family:
    """What start-up needs to bring a model to life."""

    build: Callable[[Step3p7Config, Toolkit], LanguageModel]
    build_tower: Callable[[Step3p7Config, ImageConfig, torch.dtype], ImageEncoder]
    rules: Callable[[Step3p7Config, Mapping[int, str], int], RuleBook]
    """Formats of the routed experts by layer, and the number of draft modules to load."""
    build_draft: Callable[[Step3p7Config, int, Embedding, Toolkit], DraftModel]
    """The first so many draft modules, which share the main model's embedding."""


def _tower(config: Step3p7Config, images: ImageConfig, dtype: torch.dtype) -> ImageEncoder:
    assert config.vision is not None, "a checkpoint without tower takes no images"
    return VisionTower(config.vision, images, config.text.hidden_size, dtype)


STEP3P7: Final = Family(
    build=lambda config, tools: Step3p7Text(config.text, tools),
    build_tower=_tower,
    rules=lambda config, formats, drafts: step3p7_rules(config, formats, drafts, tower=config.vision is not None),
    build_draft=lambda config, drafts, embedding, tools: Step3p7Mtp(config.text, drafts, embedding, tools),
)
FAMILIES: Final = {"step3p5": STEP3P7, "step3p7": STEP3P7}
"""`model_type` of config.json -> family; the keys are those of `srt.configs.models.READERS`."""
