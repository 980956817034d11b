"""From a plan to a runner: device, group, model, weights, KV memory. The one place that picks backends."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch

from srt.configs.census import announced_formats, expert_formats
from srt.configs.models import read_config
from srt.configs.plan import RuntimePlan
from srt.configs.step3p7 import Step3p7Config
from srt.distributed import TensorGroup, join_group
from srt.errors import StartupError
from srt.grammar.shelf import Shelf
from srt.layers.batch import KVLayer
from srt.layers.cpu.build import KernelsUnavailable, default_cache
from srt.layers.cpu.kernels import load_kernels
from srt.layers.gpu import current_gpu
from srt.layers.moe.backends import Candidate, RunnerChoice, candidates, choose_runner
from srt.layers.moe.placement import place
from srt.layers.ops import Ops
from srt.layers.parameter import Parameters, nested
from srt.layers.quant.registry import format_of
from srt.layers.toolkit import Toolkit
from srt.models.contract import DraftModel, ImageEncoder, LanguageModel
from srt.models.registry import FAMILIES
from srt.tiles import TileFiles
from srt.weights.files import RandomWeights, Source
from srt.weights.load import LoadReport, load
from srt.weights.rules import RuleBook
from srt.worker.device.careful import HostRows
from srt.worker.device.footprint import footprint
from srt.worker.device.mtp import DeviceProposer, DeviceWindows, NoDeviceGuesses
from srt.worker.device.passes import Passes
from srt.worker.device.rows import DeviceRows
from srt.worker.device.runner import DeviceRunner
from srt.worker.device.sampler import Sampler, TorchSampler
from srt.worker.drafting import build_draft, build_proposer, checkpoint_source, with_draft_layers
from srt.worker.facts import expert_facts, kv_scales, loaded
from srt.worker.grammars import RowGrammars, open_grammars
from srt.worker.image_features import ImageFeatures
from srt.worker.kv_pool import allocate_kv, kv_bytes
from srt.worker.memory import kv_bytes_by_group, weight_bytes
from srt.worker.pick import Pick as Pick  # for those who start workers
from srt.worker.pick import choose_attention, compiled_attention
from srt.worker.row_images import RowImages, TowerImages
from srt.worker.rows import Rows
from srt.worker.runner import Runner

if TYPE_CHECKING:
    from srt.worker.device.ahead import Ahead, Note, Shape, Target  # import Triton, which may not be there

log = logging.getLogger(__name__)

OPS: Final = {
    "torch": "srt.layers.ops:TorchOps",
    "native": "srt.layers.cpu.ops:CpuOps",
    "triton": "srt.layers.cuda.ops:TritonOps",
}
LINEAR: Final = {
    "plain": "srt.layers.linear:PlainLinear",
    "onednn": "srt.layers.linear:OneDnnLinear",
    "native": "srt.layers.cpu.linear:CpuLinear",
    "triton": "srt.layers.cuda.linear:TritonLinear",
}
ATTENTION: Final = {
    "reference": "srt.layers.attention.reference:ReferenceAttention",
    "native": "srt.layers.cpu.attention:CpuAttention",
    "triton": "srt.layers.cuda.attention:TritonAttention",
    "flashinfer": "srt.layers.attention.flashinfer:attention_for",
}
ROWS: Final = {
    "device": "srt.worker.device.rows:DeviceRows",
    "graphs": "srt.worker.device.fused_rows:FusedRows",
}
SAMPLERS: Final = {"graphs": "srt.worker.device.fused_sampler:FusedSampler"}

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPES: Final = {**DTYPES, "fp8_e4m3": torch.float8_e4m3fn}


ON_HOST: Final = Pick("host", "the model runs on the CPU")


@dataclass(frozen=True)
class Picks:
    """One backend of each kind."""

    ops: Pick
    linear: Pick
    attention: Pick
    experts: Pick
    engine: Pick = ON_HOST
    """What keeps the rows and runs the steps."""
    rows: Pick | None = None
    """What keeps the rows on a device; None for what the engine brings."""


@dataclass(frozen=True)
class Parts:
    """What an engine is made of: models with their KV memory, and what they were built with."""

    model: LanguageModel
    draft: DraftModel | None
    kv: Sequence[KVLayer]
    draft_kv: Sequence[KVLayer]
    tools: Toolkit
    images: RowImages | None
    hidden_size: int


Engine = Runner | DeviceRunner


@dataclass(frozen=True)
class Started:
    """A worker that can work, and what there is to say about it in the start-up table."""

    runner: Engine
    facts: dict[str, str]
    memory: dict[str, int]
    """Bytes held on this rank, by the parts of the plan."""
    shelf: Shelf | None = None
    """Where the runner finds grammars, to be filled from outside."""


def unheard(phase: str) -> None:
    """A phase is over that nobody asks for."""


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
    if device == "cuda":
        return _gpu_backends(picks)
    if device == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return replace(picks, linear=Pick("onednn", f"{reason}; oneDNN has bfloat16 arithmetic here"))
    return picks


def _gpu_backends(picks: Picks) -> Picks:
    """Triton kernels where Triton is there, and graphs of them."""
    if importlib.util.find_spec("triton") is None:
        return replace(picks, engine=Pick("device", "rows and samples stay on the GPU; Triton is not installed"))
    gpu = current_gpu()
    triton = Pick("triton", "compiled for this GPU", (gpu,))
    linear = Pick("triton", "for few tokens, cuBLAS for many", (gpu,))
    engine = Pick("graphs", "rows and samples stay on the GPU; decodes are recorded while the server is idle", (gpu,))
    return Picks(triton, linear, triton, picks.experts, engine)


def _fitting(picks: Picks, plan: RuntimePlan) -> Picks:
    """Without backends that cannot compute this model."""
    attention = choose_attention(picks.attention, plan, DTYPES[plan.dtype], KV_DTYPES[plan.kv_dtype])
    picks = replace(picks, attention=attention)
    odd = [group.head_dim for group in plan.groups if group.head_dim < 16 or group.head_dim & (group.head_dim - 1)]
    if picks.attention.key not in ("triton", "flashinfer") or not odd:
        return picks
    return replace(picks, attention=Pick("reference", f"the Triton kernels take no heads of size {odd[0]}"))


def _recordable(picks: Picks, experts: Mapping[int, RunnerChoice]) -> Picks:
    """Without graphs where something in a step waits for the GPU, as the reference backends do."""
    waiting = {picks.attention.key, *(choice.name for choice in experts.values())} & {"reference"}
    if picks.engine.key != "graphs" or not waiting:
        return picks
    return replace(picks, engine=Pick("device", "rows stay on the GPU; the reference backends cannot be recorded"))


def build(registry: dict[str, str], pick: Pick) -> Any:
    """An instance of the class, or what the function makes, that a registry names, or that the pick names itself."""
    module, name = registry.get(pick.key, pick.key).split(":")
    return getattr(importlib.import_module(module), name)(*pick.arguments)


def start(
    plan: RuntimePlan,
    rundir: Path,
    rank: int,
    progress: Callable[[int, int], None],
    picks: Picks | None = None,
    ended: Callable[[str], None] = unheard,
) -> Started:
    """Bring up one rank, with the fastest backends unless others are given. `ended` is told each phase when it is over.

    Raises: StartupError if the plan does not fit the checkpoint or the checkpoint does not fit the model.
    """
    dtype = DTYPES.get(plan.dtype)
    if dtype is None:
        raise StartupError(f"dtype {plan.dtype} is not supported, choose one of {', '.join(DTYPES)}")
    device = worker_device(plan, rank)
    path = Path(plan.model.path)
    config, drafting = with_draft_layers(read_config(path), plan), plan.drafting
    formats = announced_formats(config) if plan.server.load_format == "dummy" else expert_formats(path, config)
    group = join_group(rank, plan.server.tp_size, rundir, device)
    picks = _fitting(picks or pick_backends(plan.device.device, dtype, plan.worker_threads), plan)
    ended("kernels")
    with torch.inference_mode(), device:
        family = FAMILIES[config.model_type]
        try:
            experts = _runners(config, formats, plan, group, picks.experts)
            picks = _recordable(picks, experts)
            compiling = _compile_ahead(Built(plan, config, formats, experts, picks, group))
            # Native kernels bring their own threads; waking torch's for few small calls would cost more than it saves.
            native = {picks.attention.key, picks.ops.key, *(choice.name for choice in experts.values())} == {"native"}
            torch.set_num_threads(1 if native else plan.worker_threads)
            tools = _toolkit(picks, plan, group, experts)
            model = family.build(config, tools)
            images = plan.model.images
            tower = None if images is None else family.build_tower(config, images, dtype)
            draft = build_draft(plan, config, family, model, tools)
        except ValueError as error:
            raise StartupError(f"--tp-size {group.size} does not fit the model: {error}") from error
        ended("model")
        began = time.perf_counter()
        parameters = model.parameters() | ({} if tower is None else nested("vision", tower.parameters()))
        parameters |= {} if draft is None else draft.parameters()
        report = load_weights(family.rules(config, formats, drafting.modules), parameters, plan, progress)
        loaded_s = time.perf_counter() - began
        ended("weights")
        kv = allocate_kv(plan.groups, plan.page_size, group.size, KV_DTYPES[plan.kv_dtype])
    ended("kv memory")
    memory = weight_bytes(parameters, [one for one in (model, tower, draft) if one is not None])
    memory |= kv_bytes_by_group(plan.groups, kv)
    facts = {kind: f"{pick.key} ({pick.reason})" for kind, pick in _named(picks)}
    facts |= expert_facts(experts, formats)
    facts |= {"ranks": group.describe()} if group.size > 1 else {}
    facts |= {
        "threads": str(plan.worker_threads),
        "weights": f"{loaded(report)} in {loaded_s:.1f} s",
        "kv memory": f"{kv_bytes(kv) / 2**20:.1f} MiB in {plan.kv_dtype}{kv_scales(plan, parameters)}",
    }
    layers, row_images = config.text.main_layers, _row_images(plan, rundir, tower, device)
    parts = Parts(model, draft, kv[:layers], kv[layers:], tools, row_images, config.text.hidden_size)
    rows = Rows(*_row_sizes(plan))
    shelf, grammars = open_grammars(plan, rundir, rows)
    engine = _engine(picks, plan, device, parts, rows, grammars)
    if compiling is not None:
        facts["compiled kernels"] = compiling.result()
        ended("compiled kernels")
    return Started(engine, facts, memory | _working_memory(engine, plan, device, ended), shelf)


def _working_memory(
    engine: Engine, plan: RuntimePlan, device: torch.device, ended: Callable[[str], None]
) -> dict[str, int]:
    """On a GPU, what the largest step takes, and what else is there for it."""
    if device.type != "cuda" or not isinstance(engine, DeviceRunner):
        return {}
    found = footprint(engine, plan.chunked_prefill_size, plan.drafting.drafts, plan.device.memory_bytes)
    ended("largest step")
    return found


@dataclass(frozen=True)
class Built:
    """What a model is built from."""

    plan: RuntimePlan
    config: Step3p7Config
    formats: Mapping[int, str]
    experts: Mapping[int, RunnerChoice]
    picks: Picks
    group: TensorGroup


def _compile_ahead(built: Built) -> Ahead | None:
    """Begin to compile what steps need, where all of it is Triton's. Whatever is wrong with it, the server runs
    without."""
    plan, names = built.plan, {choice.name for choice in built.experts.values()}
    if built.picks.engine.key != "graphs" or names - {"triton"}:
        return None
    from srt.worker.device.ahead import Ahead, Target, shapes_for

    try:
        target = Target.here()
        shapes = shapes_for(plan.max_running_requests, plan.drafting.drafts, plan.max_step_tokens)
        note = note_of(built, shapes, target)
        return Ahead(partial(passes_without_memory, built), shapes, note, target, plan.worker_threads)
    except Exception:
        log.exception("kernels are not compiled ahead but when they are first launched")
        return None


def note_of(built: Built, shapes: Sequence[Shape], target: Target) -> Note:
    """By all that decides which kernels a rank needs; ranks of one server need the same."""
    from srt.worker.device.ahead import Note

    plan = built.plan
    sizes = _row_sizes(plan), plan.dtype, plan.kv_dtype, built.group.size, plan.server.ep_size
    return Note(built.config, sorted(built.formats.items()), built.picks, sizes, shapes, target)


def passes_without_memory(built: Built) -> Passes:
    """Steps of a model with one layer of each kind, whose tensors have shapes and no memory."""
    from srt.worker.device.ahead import META, Lookalike, fill, without_repeats

    plan, group = built.plan, Lookalike(built.group)
    picks = replace(built.picks, attention=compiled_attention(built.picks.attention))
    text = without_repeats(built.config.text, built.formats)
    config = msgspec.structs.replace(built.config, text=text)
    tools = _toolkit(picks, plan, group, built.experts)
    family = FAMILIES[config.model_type]
    model = family.build(config, tools)
    draft = build_draft(plan, config, family, model, tools)
    fill(model.parameters() | ({} if draft is None else draft.parameters()))
    kv = allocate_kv(plan.groups, plan.page_size, group.size, KV_DTYPES[plan.kv_dtype])
    main = [kv[layer.index] for layer in text.layers]
    parts = Parts(model, draft, main, kv[built.config.text.main_layers :], tools, None, text.hidden_size)
    rows, proposer = _device_rows(built.picks, plan, META, parts)
    return Passes(model, main, rows, tools.ops, proposer, build_sampler(built.picks.engine, tools.ops))


def worker_device(plan: RuntimePlan, rank: int) -> torch.device:
    """The device of a rank, made current.

    Raises: StartupError if torch cannot use the GPU that the driver has.
    """
    if plan.device.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StartupError(f"torch {torch.__version__} cannot use the {plan.device.name}; use --device cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    # Float32 means float32, in the image tower's convolutions as well. (This name is no attribute of a module to mypy.)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    return device


def _row_images(plan: RuntimePlan, rundir: Path, tower: ImageEncoder | None, device: torch.device) -> RowImages | None:
    """What knows the images of rows; None for a model without a tower."""
    images = plan.model.images
    if tower is None or images is None:
        return None
    kept = ImageFeatures(
        tower,
        TileFiles(rundir, images),
        images,
        device,
        budget_bytes=plan.server.encoder_cache_bytes,
        threads=plan.worker_threads,
    )
    return TowerImages(kept, images.image_token_id)


def _row_sizes(plan: RuntimePlan) -> tuple[int, int, int, int, int]:
    """Groups, page size, context, rows and guesses: how large the rows' state is."""
    return len(plan.groups), plan.page_size, plan.context_length, plan.max_running_requests, plan.drafting.drafts


def _engine(
    picks: Picks, plan: RuntimePlan, device: torch.device, parts: Parts, rows: Rows, grammars: RowGrammars
) -> Engine:
    """What keeps the rows and runs the steps: on the host, or on the device behind its back."""
    model, kv, ops, images = parts.model, parts.kv, parts.tools.ops, parts.images
    pick = picks.engine
    if pick.key == "host":
        guesses = build_proposer(plan, rows, parts.tools, parts.draft, parts.draft_kv)
        return Runner(model, kv, rows, ops, images, guesses, grammars)
    device_rows, proposer = _device_rows(picks, plan, device, parts)
    shape = (plan.drafting.drafts, plan.chunked_prefill_size) if pick.key == "graphs" else None
    sampler = build_sampler(pick, ops)
    return DeviceRunner(model, kv, device_rows, ops, HostRows(rows, grammars), images, proposer, shape, sampler)


def _device_rows(
    picks: Picks, plan: RuntimePlan, device: torch.device, parts: Parts
) -> tuple[DeviceRows, DeviceProposer]:
    """Rows on a device, and what guesses for them."""
    pick = picks.rows or replace(picks.engine, arguments=())
    rows: DeviceRows = build(ROWS, replace(pick, arguments=(*pick.arguments, device, *_row_sizes(plan))))
    if parts.draft is None:
        return rows, NoDeviceGuesses()
    ops, size, dtype = parts.tools.ops, parts.hidden_size, parts.tools.dtype
    return rows, DeviceWindows(parts.draft, parts.draft_kv, rows, ops, size, dtype)


def build_sampler(pick: Pick, ops: Ops) -> Sampler:
    """Draws of a few kernels where there is Triton."""
    sampler: Sampler = TorchSampler(ops) if pick.key == "device" else build(SAMPLERS, pick)
    return sampler


def load_weights(
    book: RuleBook, parameters: Parameters, plan: RuntimePlan, progress: Callable[[int, int], None]
) -> LoadReport:
    """Fill the parameters from the checkpoint, or with seeded random values.

    Raises: StartupError that lists everything that does not fit.
    """
    source: Source
    if plan.server.load_format == "dummy":
        source = RandomWeights(parameters, book, plan.random_seed)
    else:
        source = checkpoint_source(plan)
    report = load(parameters, book, source, progress)
    if plan.device.device == "cuda":
        torch.cuda.synchronize()  # else the time that is told for it is that of asking
    return report


def _runners(
    config: Step3p7Config, formats: Mapping[int, str], plan: RuntimePlan, group: TensorGroup, pick: Pick
) -> dict[int, RunnerChoice]:
    """A runner for each layer with routed experts; layers of one format and clamp share one.

    Raises: ValueError if experts do not divide over the ranks as asked; StartupError if the backend asked for cannot
    run here.
    """
    text = config.text
    gpu = current_gpu() if plan.device.device != "cpu" else None
    asked = candidates(plan.server.moe_runner_backend, Candidate(pick.key, pick.reason, pick.arguments), gpu)
    chosen: dict[tuple[str, float | None], RunnerChoice] = {}
    runners = {}
    for layer in text.layers:
        if layer.routed and text.moe is not None:
            key = formats[layer.index], layer.limit
            if key not in chosen:
                weights = format_of(key[0], DTYPES[plan.dtype])
                share = place(group, plan.server.ep_size, text.moe, weights)
                chosen[key] = choose_runner(asked, weights, share, text.hidden_size, layer.limit)
            runners[layer.index] = chosen[key]
    return runners


def _toolkit(picks: Picks, plan: RuntimePlan, group: TensorGroup, experts: Mapping[int, RunnerChoice]) -> Toolkit:
    return Toolkit(
        ops=build(OPS, picks.ops),
        linear=build(LINEAR, picks.linear),
        attention=build(ATTENTION, picks.attention),
        experts={layer: choice.runner for layer, choice in experts.items()},
        ep_size=plan.server.ep_size,
        group=group,
        dtype=DTYPES[plan.dtype],
        positions=plan.context_length + 1,
    )


def _named(picks: Picks) -> list[tuple[str, Pick]]:
    return [
        ("engine", picks.engine),
        ("ops", picks.ops),
        ("linear", picks.linear),
        ("attention", picks.attention),
    ]
