"""Which runner computes a layer's experts: an order of preference, asked layer by layer.

A runner that cannot compute a layer exactly says why, and the layer takes the next one. Nothing is approximated in
silence: a clamp that a kernel would drop or apply elsewhere is a reason to refuse.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from srt.errors import StartupError
from srt.layers.gpu import Gpu
from srt.layers.moe.contract import ExpertRunner, rank_shape
from srt.layers.moe.flashinfer import FlashInferUnavailable, trtllm_kernels
from srt.layers.moe.placement import Placement
from srt.layers.quant.contract import WeightFormat

RUNNERS: Final = {
    "native": "srt.layers.cpu.experts:CpuExperts",
    "flashinfer_trtllm": "srt.layers.moe.trtllm:TrtllmExperts",
    "triton": "srt.layers.moe.triton_experts:TritonExperts",
    "reference": "srt.layers.moe.reference:ReferenceExperts",
}
"""Runner by the name that `--moe-runner-backend` knows; built from a weight format and its own arguments."""

GPU_RUNNERS: Final = ("flashinfer_trtllm", "triton")
SM100: Final = 10
"""Major compute capability of the GPUs that TRT-LLM-Gen's kernels are built for."""


@dataclass(frozen=True)
class Candidate:
    """A runner: its name, why it is worth asking, and its own constructor arguments."""

    name: str
    reason: str
    arguments: tuple[Any, ...] = ()
    unfit: str | None = None
    """Why this process cannot run it whatever the layer; None if it can."""


@dataclass(frozen=True)
class RunnerChoice:
    """The runner of one layer, its name, and why it is this one."""

    runner: ExpertRunner
    name: str
    reason: str


def candidates(asked: str, fastest: Candidate, gpu: Gpu | None) -> list[Candidate]:
    """The runners to ask, in order; `fastest` is the CPU's.

    A backend that was asked for comes first. Those that follow are for the layers that it refuses.
    Raises: StartupError if the one that was asked for cannot run in this process at all.
    """
    everywhere = Candidate("reference", "runs everywhere")
    if gpu is None:
        found = [fastest, everywhere, *(Candidate(name, "", unfit="needs a GPU") for name in GPU_RUNNERS)]
    else:
        found = [_trtllm(gpu), _triton(gpu), everywhere]
    if asked == "auto":
        return [candidate for candidate in found if candidate.unfit is None or gpu is not None]
    first = next((one for one in found if one.name == asked), Candidate(asked, "", unfit="needs a CPU with a compiler"))
    if first.unfit is not None:
        raise StartupError(f"--moe-runner-backend {asked}: {first.unfit}")
    rest = [] if asked == "reference" else [one for one in found if one.name != asked and one.unfit is None]
    return [replace(first, reason="as asked"), *rest]


def _trtllm(gpu: Gpu) -> Candidate:
    name = "flashinfer_trtllm"
    if gpu.capability[0] != SM100:
        return Candidate(name, "", unfit=f"needs a GPU of the SM100 family, this is {gpu.text}")
    try:
        return Candidate(name, f"fastest on {gpu.text}", (gpu, trtllm_kernels()))
    except FlashInferUnavailable as unavailable:
        return Candidate(name, "", unfit=str(unavailable))


def _triton(gpu: Gpu) -> Candidate:
    if importlib.util.find_spec("triton") is None:
        return Candidate("triton", "", unfit="Triton is not installed")
    return Candidate("triton", f"compiled for {gpu.text}", (gpu,))


def choose_runner(
    asked: Sequence[Candidate], weights: WeightFormat, place: Placement, hidden: int, limit: float | None
) -> RunnerChoice:
    """The first candidate that computes these experts in this format exactly.

    Raises: ValueError that says why each of them refused.
    """
    refusals = list[str]()
    for candidate in asked:
        if candidate.unfit is not None:
            refusals.append(f"{candidate.name}: {candidate.unfit}")
            continue
        module, cls = RUNNERS[candidate.name].split(":")
        runner: ExpertRunner = getattr(importlib.import_module(module), cls)(weights, *candidate.arguments)
        refusal = runner.refuses(rank_shape(runner, place, hidden, limit))
        if refusal is None:
            return RunnerChoice(runner, candidate.name, "; ".join([*refusals, candidate.reason]))
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError("; ".join(refusals))
