"""From a plan to a runner: device, group, model, weights, KV memory. The one place that picks backends."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, assert_never

import torch

from srt.configs.models import read_config
from srt.configs.plan import RuntimePlan
from srt.configs.step3p7 import Step3p7Config, part_of
from srt.distributed import TensorGroup, join_group
from srt.errors import StartupError
from srt.layers.batch import KVLayer
from srt.layers.cpu.build import KernelsUnavailable, default_cache
from srt.layers.cpu.kernels import load_kernels
from srt.layers.parameter import Parameters
from srt.layers.toolkit import Toolkit
from srt.models.contract import DraftModel
from srt.models.registry import FAMILIES, Family
from srt.weights.files import Combined, Picked, RandomWeights, Shards, Source
from srt.weights.load import LoadReport, load
from srt.worker.kv_pool import allocate_kv, kv_bytes
from srt.worker.mtp import WindowProposer
from srt.worker.proposer import NgramProposer, NoGuesses, Proposer
from srt.worker.rows import Rows
from srt.worker.runner import Runner

OPS: Final = {"torch": "srt.layers.ops:TorchOps", "native": "srt.layers.cpu.ops:CpuOps"}
LINEAR: Final = {
    "plain": "srt.layers.linear:PlainLinear",
    "onednn": "srt.layers.linear:OneDnnLinear",
    "native": "srt.layers.cpu.linear:CpuLinear",
}
ATTENTION: Final = {
    "reference": "srt.layers.attention.reference:ReferenceAttention",
    "native": "srt.layers.cpu.attention:CpuAttention",
}
EXPERTS: Final = {
    "reference": "srt.layers.moe.reference:ReferenceExperts",
    "native": "srt.layers.cpu.experts:CpuExperts",
}

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pick:
    """A backend by its key in a registry, why it was taken, and what its class is made with."""

    key: str
    reason: str
    arguments: tuple[object, ...] = ()


@dataclass(frozen=True)
class Picks:
    """One backend of each kind."""

    ops: Pick
    linear: Pick
    attention: Pick
    experts: Pick


@dataclass(frozen=True)
class Started:
    """A worker that can work, and what there is to say about it in the start-up table."""

    runner: Runner
    facts: dict[str, str]


def reference_backends(reason: str) -> Picks:
    """Plain torch for everything: every device, every dtype, and the truth that tests hold the others to."""
    reference = Pick("reference", reason)
    return Picks(ops=Pick("torch", reason), linear=Pick("plain", reason), attention=reference, experts=reference)


def pick_backends(device: str, dtype: torch.dtype, threads: int) -> Picks:
    """The fastest backend of each kind that runs this dtype on this device.

    On a CPU that is the native kernels, all or none of them; without a compiler plain torch does everything.
    """
    reason = "runs everywhere"
    if device == "cpu":
        try:
            kernels = load_kernels(default_cache(), threads)
        except KernelsUnavailable as unavailable:
            reason = f"native kernels unavailable: {unavailable}"
        else:
            native = Pick("native", f"{kernels.vectors}, {kernels.threading}", (kernels,))
            return Picks(native, native, native, native)
    picks = reference_backends(reason)
    if device == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return replace(picks, linear=Pick("onednn", f"{reason}; oneDNN has bfloat16 arithmetic here"))
    return picks


def build(registry: dict[str, str], pick: Pick) -> Any:
    """An instance of the class that a registry names."""
    module, name = registry[pick.key].split(":")
    return getattr(importlib.import_module(module), name)(*pick.arguments)


def start(
    plan: RuntimePlan, rundir: Path, rank: int, progress: Callable[[int, int], None], picks: Picks | None = None
) -> Started:
    """Bring up one rank, with the fastest backends unless others are given.

    Raises: StartupError if the plan does not fit the checkpoint or the checkpoint does not fit the model.
    """
    dtype = DTYPES.get(plan.dtype)
    if dtype is None:
        raise StartupError(f"dtype {plan.dtype} is not supported, choose one of {', '.join(DTYPES)}")
    config, drafting = read_config(Path(plan.model.path)), plan.drafting
    group = join_group(rank, plan.server.tp_size, rundir)
    picks = picks or pick_backends(plan.device.device, dtype, plan.worker_threads)
    # Native kernels bring their own threads; waking torch's for its few small calls would cost more than it saves.
    torch.set_num_threads(1 if picks.ops.key == "native" else plan.worker_threads)
    with torch.inference_mode(), torch.device(plan.device.device):
        tools = _toolkit(picks, plan, group, dtype)
        family = FAMILIES[config.model_type]
        try:
            model = family.build(config, tools)
            draft = family.build_draft(config, drafting.modules, model.embedding, tools) if drafting.modules else None
        except ValueError as error:
            raise StartupError(f"--tp-size {group.size} does not fit the model: {error}") from error
        parameters = model.parameters() | ({} if draft is None else draft.parameters())
        began = time.perf_counter()
        report = load_weights(config, family, parameters, plan, progress)
        loaded_s = time.perf_counter() - began
        kv = allocate_kv(plan.groups, plan.page_size, group.size, dtype)
        rows = Rows(
            len(plan.groups), plan.page_size, plan.context_length, plan.max_running_requests, drafting.drafts
        )
        main, drafts = kv[: config.text.main_layers], kv[config.text.main_layers :]
        proposer = _proposer(plan, config, rows, tools, draft, drafts)
    facts = {kind: f"{pick.key} ({pick.reason})" for kind, pick in _named(picks)}
    facts |= {
        "threads": str(plan.worker_threads),
        "weights": f"{_loaded(report)} in {loaded_s:.1f} s",
        "kv memory": f"{kv_bytes(kv) / 2**20:.1f} MiB",
    }
    return Started(Runner(model, main, rows, tools.ops, proposer), facts)


def load_weights(
    config: Step3p7Config,
    family: Family,
    parameters: Parameters,
    plan: RuntimePlan,
    progress: Callable[[int, int], None],
) -> LoadReport:
    """Fill the parameters from the checkpoint, or with seeded random values.

    Raises: StartupError that lists everything that does not fit.
    """
    drafting = plan.drafting
    book = family.rules(config, drafting.modules)
    source: Source
    if plan.server.load_format == "dummy":
        source = RandomWeights(parameters, book, plan.random_seed)
    elif drafting.modules and drafting.weights_path != plan.model.path:
        main = config.text.main_layers
        source = Combined(
            Picked(Shards(Path(plan.model.path)), lambda name: part_of(name, main) != "mtp"),
            Picked(Shards(Path(drafting.weights_path)), lambda name: part_of(name, main) == "mtp"),
        )
    else:
        source = Shards(Path(plan.model.path))
    return load(parameters, book, source, progress)


def _proposer(
    plan: RuntimePlan,
    config: Step3p7Config,
    rows: Rows,
    tools: Toolkit,
    draft: DraftModel | None,
    kv: Sequence[KVLayer],
) -> Proposer:
    """What guesses ahead, as the plan says."""
    match plan.drafting.algorithm:
        case "off":
            return NoGuesses()
        case "ngram":
            return NgramProposer(rows, plan.drafting.drafts)
        case "mtp":
            assert draft is not None, "a plan with draft modules has a model of them"
            size = plan.max_running_requests, config.text.hidden_size
            return WindowProposer(draft, kv, rows, tools.ops, size, tools.dtype)
        case _ as unknown:
            assert_never(unknown)


def _toolkit(picks: Picks, plan: RuntimePlan, group: TensorGroup, dtype: torch.dtype) -> Toolkit:
    return Toolkit(
        ops=build(OPS, picks.ops),
        linear=build(LINEAR, picks.linear),
        attention=build(ATTENTION, picks.attention),
        experts=build(EXPERTS, picks.experts),
        group=group,
        dtype=dtype,
        positions=plan.context_length + 1,
    )


def _named(picks: Picks) -> list[tuple[str, Pick]]:
    return [("ops", picks.ops), ("linear", picks.linear), ("attention", picks.attention), ("experts", picks.experts)]


def _loaded(report: LoadReport) -> str:
    """ "229.3 MB text; left on disk: mtp 47.6 MB"."""
    sizes = {part: f"{size / 1e6:.1f} MB" for part, size in sorted(report.bytes.items())}
    read = sizes.pop("text", "0 MB")
    left = ", ".join(f"{part} {size}" for part, size in sizes.items())
    return f"text {read}" + (f" (left on disk: {left})" if left else "")
