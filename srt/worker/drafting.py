"""What the plan's drafter is made of on a worker: draft modules, their weights, and the proposer that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import msgspec

from srt.configs.models import read_config
from srt.configs.plan import RuntimePlan
from srt.configs.step3p7 import Step3p7Config, part_of
from srt.layers.batch import KVLayer
from srt.layers.toolkit import Toolkit
from srt.models.contract import DraftModel, LanguageModel
from srt.models.registry import Family
from srt.weights.files import Combined, Picked, Shards, Source
from srt.worker.mtp import WindowProposer
from srt.worker.proposer import NgramProposer, NoGuesses, Proposer
from srt.worker.rows import Rows


def with_draft_layers(config: Step3p7Config, plan: RuntimePlan) -> Step3p7Config:
    """The model's configuration with the MTP layers of the checkpoint that they are taken from.

    Raises: StartupError if that one cannot be read.
    """
    drafting = plan.drafting
    if not drafting.modules or drafting.weights_path == plan.model.path:
        return config
    layers = read_config(Path(drafting.weights_path)).text.mtp_layers
    return msgspec.structs.replace(config, text=msgspec.structs.replace(config.text, mtp_layers=layers))


def checkpoint_source(plan: RuntimePlan) -> Source:
    """The checkpoint's tensors; those of the MTP layers from another one where the plan says so."""
    main, drafting = Shards(Path(plan.model.path)), plan.drafting
    if not drafting.modules or drafting.weights_path == plan.model.path:
        return main
    layers = sum(len(group.layers) for group in plan.model.groups)
    return Combined(
        Picked(main, lambda name: part_of(name, layers) != "mtp"),
        Picked(Shards(Path(drafting.weights_path)), lambda name: part_of(name, layers) == "mtp"),
    )


def build_draft(
    plan: RuntimePlan, config: Step3p7Config, family: Family, model: LanguageModel, tools: Toolkit
) -> DraftModel | None:
    """The draft modules that the plan wants, to be filled with weights.

    Raises: ValueError if heads or widths do not divide by the number of ranks.
    """
    if not plan.drafting.modules:
        return None
    return family.build_draft(config, plan.drafting.modules, model.embedding, tools)


def build_proposer(
    plan: RuntimePlan, rows: Rows, tools: Toolkit, draft: DraftModel | None, kv: Sequence[KVLayer]
) -> Proposer:
    """What guesses ahead: the one place that knows all of them. `kv` is the memory of the draft modules."""
    match plan.drafting.algorithm:
        case "off":
            return NoGuesses()
        case "ngram":
            return NgramProposer(rows, plan.drafting.drafts)
        case "mtp":
            assert draft is not None, "a plan with draft modules has a model of them"
            return WindowProposer(draft, kv, rows, tools.ops, plan.max_running_requests)
        case _ as unknown:
            assert_never(unknown)
