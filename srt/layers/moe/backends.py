"""Which runner computes a layer's experts: an order of preference, asked layer by layer.

A runner that cannot compute a layer exactly says why, and the layer takes the next one. Nothing is approximated in
silence: a clamp that a kernel would drop or apply elsewhere is a reason to refuse.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from srt.layers.moe.contract import ExpertRunner, rank_shape
from srt.layers.moe.placement import Placement
from srt.layers.quant.contract import WeightFormat

RUNNERS: Final = {
    "native": "srt.layers.cpu.experts:CpuExperts",
    "reference": "srt.layers.moe.reference:ReferenceExperts",
}
"""Runner by the name that `--moe-runner-backend` knows; built from a weight format and its own arguments."""


@dataclass(frozen=True)
class Candidate:
    """A runner that the device can run: its name, why it is worth asking, and its own constructor arguments."""

    name: str
    reason: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class RunnerChoice:
    """The runner of one layer, its name, and why it is this one."""

    runner: ExpertRunner
    name: str
    reason: str


def choose_runner(
    candidates: Sequence[Candidate], weights: WeightFormat, place: Placement, hidden: int, limit: float | None
) -> RunnerChoice:
    """The first candidate that computes these experts in this format exactly.

    Raises: ValueError that says why each of them refused.
    """
    refusals = list[str]()
    for candidate in candidates:
        module, cls = RUNNERS[candidate.name].split(":")
        runner: ExpertRunner = getattr(importlib.import_module(module), cls)(weights, *candidate.arguments)
        refusal = runner.refuses(rank_shape(runner, place, hidden, limit))
        if refusal is None:
            return RunnerChoice(runner, candidate.name, "; ".join([*refusals, candidate.reason]))
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError("; ".join(refusals))
