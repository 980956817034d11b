"""Which runner computes a layer's experts: an order of preference, asked layer by layer.

A runner that cannot compute a layer exactly says why, and the layer takes the next one. Nothing is approximated in
silence: a clamp that a kernel would drop or apply elsewhere is a reason to refuse.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from srt.layers.moe.contract import ExpertRunner, rank_shape
from srt.layers.moe.placement import Placement
from srt.layers.quant.contract import WeightFormat

REFERENCE: Final = "reference"
RUNNERS: Final = {
    REFERENCE: "srt.layers.moe.reference:ReferenceExperts",
}
"""Runner by the name that `--moe-runner-backend` knows."""


@dataclass(frozen=True)
class RunnerChoice:
    """The runner of one layer, its name, and why it is this one."""

    runner: ExpertRunner
    name: str
    reason: str


def runner_names(device: torch.device) -> tuple[str, ...]:
    """Runners that can work on a device, the fastest first."""
    return (REFERENCE,)


def choose_runner(
    names: Sequence[str], weights: WeightFormat, place: Placement, hidden: int, limit: float | None
) -> RunnerChoice:
    """The first of `names` that computes these experts in this format exactly.

    Raises: ValueError that says why each of them refused.
    """
    refusals = list[str]()
    for name in names:
        module, cls = RUNNERS[name].split(":")
        runner: ExpertRunner = getattr(importlib.import_module(module), cls)(weights)
        refusal = runner.refuses(rank_shape(runner, place, hidden, limit))
        if refusal is None:
            return RunnerChoice(runner, name, "; ".join(refusals) or "first choice here")
        refusals.append(f"{name}: {refusal}")
    raise ValueError("; ".join(refusals))
