"""Model families by `model_type`: how to build one and how its checkpoint maps onto it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from srt.configs.step3p7 import Step3p7Config
from srt.layers.toolkit import Toolkit
from srt.models.contract import LanguageModel
from srt.models.step3p7_text import Step3p7Text
from srt.models.step3p7_weights import step3p7_rules
from srt.weights.rules import RuleBook


@dataclass(frozen=True)
class Family:
    """What start-up needs to bring a model to life."""

    build: Callable[[Step3p7Config, Toolkit], LanguageModel]
    rules: Callable[[Step3p7Config, Mapping[int, str]], RuleBook]


STEP3P7: Final = Family(
    build=lambda config, tools: Step3p7Text(config.text, tools),
    rules=step3p7_rules,
)
FAMILIES: Final = {"step3p5": STEP3P7, "step3p7": STEP3P7}
"""`model_type` of config.json -> family; the keys are those of `srt.configs.models.READERS`."""
