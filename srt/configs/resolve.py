"""From what was asked and what is there to the frozen plan: a pure function, every choice with its reason.

Memory is planned before anything is allocated: weights first, KV pools from what is left (srt/configs/pools.py).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from srt.configs.drafting import kv_groups, resolve_drafting
from srt.configs.memory import (
    CONTEXT_BYTES,
    ITEM_BYTES,
    RANKS_BYTES,
    Spread,
    Work,
    check_split,
    graph_bytes,
    position_bytes,
    row_bytes,
    step_bytes,
    weight_parts,
)
from srt.configs.plan import DeviceFacts, DraftTraits, GroupPlan, KVGroupSpec, ModelFacts, RuntimePlan
from srt.configs.pools import CPU_KV_BYTES, Limits, PoolRequest, Pools, plan_pools
from srt.configs.server import ServerConfig
from srt.configs.startup_table import Reasons, human, startup_table
from srt.errors import StartupError
from srt.formats.description import STEP

MEMORY_SHARE: Final = {"cpu": 0.9, "cuda": 0.97}
"""Share of free memory that the plan may fill. On a CPU the rest is for the processes and activations; on a GPU these
are planned, and the rest is for what the allocator cannot use."""
RUNNING_REQUESTS: Final = {"cpu": 64, "cuda": 256}
CHUNK_TOKENS: Final = {"cpu": 512, "cuda": 8192}
IMAGE_PROCESSES_MAX: Final = 4
FORMAT_OF: Final = {"step3p5": STEP.name, "step3p7": STEP.name}
"""How models write reasoning and tool calls, by `model_type`."""


def resolve(server: ServerConfig, model: ModelFacts, device: DeviceFacts, *, fresh_seed: int = 0) -> RuntimePlan:
    """Everything that start-up decides. `fresh_seed` is used where no --random-seed was given.

    Raises: StartupError, one sentence with both numbers, if the server cannot run as asked.
    """
    _check_domains(server)
    _check_gpus(server, device)
    _check_quantization(server, model)
    _check_experts(server)
    dtype, dtype_reason = _dtype(server, model)
    limits = _limits(server, model, device)
    kv_dtype = "fp8_e4m3" if server.kv_cache_dtype.startswith("fp8") else dtype
    drafting = resolve_drafting(server, model, device.device)
    groups = kv_groups(model, drafting.traits)
    _check_ranks(server, groups)
    check_split(model, server.tp_size, server.ep_size)
    weights = _weights(server, model, dtype, device, drafting.traits)
    kept = _kept(server, model, device, limits, drafting.traits)
    request = PoolRequest(
        groups=groups,
        dtype=kv_dtype,
        page_size=server.page_size,
        limits=limits,
        room=_room(server, weights, kept, dtype, device),
        usual=CPU_KV_BYTES if device.device == "cpu" else None,
        asked_tokens=server.max_total_tokens,
        asked_ratio=server.swa_full_tokens_ratio,
    )
    pools = plan_pools(request)
    context, context_reason = _context(server, model, pools)
    running = min(limits.running, *pools.pages.values())
    chunk = min(limits.chunk, context)
    plan = RuntimePlan(
        server=server,
        model=model,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        page_size=server.page_size,
        context_length=context,
        max_total_tokens=pools.full_tokens,
        groups=_groups(request, pools, server.tp_size),
        max_running_requests=running,
        max_queued_requests=server.max_queued_requests,
        chunked_prefill_size=chunk,
        max_step_tokens=chunk + running * (1 + drafting.traits.drafts),
        steps_in_flight=limits.in_flight,
        worker_threads=max(1, device.cores // server.tp_size),
        random_seed=fresh_seed if server.random_seed is None else server.random_seed,
        image_processes=min(IMAGE_PROCESSES_MAX, device.cores) if model.has_vision else 0,
        drafting=drafting.traits,
        reasoning_format=_format(server.reasoning_parser, model),
        call_format=_format(server.tool_call_parser, model),
    )
    final = msgspec.structs.replace(limits, context=context, running=running, chunk=chunk)
    plan = msgspec.structs.replace(plan, memory=_memory(plan, weights, final))
    reasons = Reasons(
        dtype=dtype_reason,
        context=context_reason,
        pools=pools.reason,
        running_wanted=limits.running,
        drafting=drafting.reason,
    )
    return msgspec.structs.replace(plan, table=startup_table(plan, reasons))


def _format(asked: str, model: ModelFacts) -> str:
    """The format that a parser option means; the checkpoint's family writes in one."""
    match asked:
        case "auto":
            return FORMAT_OF.get(model.model_type, "")
        case "none":
            return ""
        case name:
            return name


def _memory(plan: RuntimePlan, weights: dict[str, int], limits: Limits) -> dict[str, int]:
    """Planned bytes of all that the plan fixes, by part."""
    pools = {f"KV: {one.name}": (one.pages + 1) * one.page_bytes * plan.server.tp_size for one in plan.groups}
    parts = {f"weights: {part}": size for part, size in weights.items()}
    return parts | _kept(plan.server, plan.model, plan.device, limits, plan.drafting) | pools


def _check_ranks(server: ServerConfig, groups: tuple[KVGroupSpec, ...]) -> None:
    for group in groups:
        if group.kv_heads % server.tp_size:
            raise StartupError(
                f"--tp-size is {server.tp_size}; the {group.name} layers have {group.kv_heads} KV heads, "
                "which must be divisible by it"
            )


def _check_gpus(server: ServerConfig, device: DeviceFacts) -> None:
    if device.device == "cuda" and server.tp_size > device.cuda_devices:
        raise StartupError(f"--tp-size is {server.tp_size}; {device.cuda_devices} GPUs are there")


def _check_domains(server: ServerConfig) -> None:
    for domain in server.media_domains:
        if not re.fullmatch(r"[\w.-]+", domain):
            raise StartupError(f"--allowed-media-domains names {domain!r}; give names without scheme, port or path")


def _weights(
    server: ServerConfig, model: ModelFacts, dtype: str, device: DeviceFacts, drafting: DraftTraits
) -> dict[str, int]:
    """Bytes of the parts of the model that are loaded, over all ranks. The image tower is whole on each of them."""
    return weight_parts(model, _spread(server, dtype, device), drafting.modules, tower=model.has_vision)


def _spread(server: ServerConfig, dtype: str, device: DeviceFacts) -> Spread:
    return Spread(server.tp_size, server.ep_size, ITEM_BYTES[dtype], panels=device.device == "cpu")


def _kept(
    server: ServerConfig, model: ModelFacts, device: DeviceFacts, limits: Limits, drafting: DraftTraits
) -> dict[str, int]:
    """Bytes of what else stays, over all ranks: rotary tables, features of images; on a GPU also rows, what steps need,
    graphs and the driver."""
    tables = {"position tables": position_bytes(model, limits.context, drafting.modules)}
    features = {"image features": server.encoder_cache_bytes} if model.has_vision else {}
    rest = {}
    if device.device == "cuda":
        spread = _spread(server, _dtype(server, model)[0], device)
        tokens = limits.chunk + limits.running * (1 + drafting.drafts)
        work = Work(tokens, limits.running, drafting.drafts, drafting.modules)
        entries = -(-limits.context // server.page_size) * len(kv_groups(model, drafting))
        rest = {
            "rows": row_bytes(model, work, limits.context, entries, spread.item_bytes),
            "largest step": step_bytes(model, work, spread),
            "graphs": graph_bytes(model, work, spread),
            "driver": CONTEXT_BYTES + (RANKS_BYTES if server.tp_size > 1 else 0),
        }
    return {part: size * server.tp_size for part, size in (tables | features | rest).items() if size}


def _check_experts(server: ServerConfig) -> None:
    if server.moe_runner_backend == "flashinfer_cutlass":
        raise StartupError(
            "--moe-runner-backend flashinfer_cutlass is refused: those kernels clamp before silu, the model after it; "
            "all they run is run exactly by native, flashinfer_trtllm or triton"
        )


def _check_quantization(server: ServerConfig, model: ModelFacts) -> None:
    asked = {"modelopt_fp4": "modelopt"}.get(server.quantization, server.quantization)
    stored = model.experts.removesuffix("-a16")
    if asked not in ("auto", stored, model.producer):
        raise StartupError(f"--quantization is {server.quantization}; the checkpoint's experts are stored as {stored}")


def _dtype(server: ServerConfig, model: ModelFacts) -> tuple[str, str]:
    if model.dtype not in ITEM_BYTES:
        raise StartupError(f"the checkpoint is stored in {model.dtype}; supported are {', '.join(ITEM_BYTES)}")
    if server.dtype != "auto":
        return server.dtype, "--dtype"
    if model.dtype in ("bfloat16", "float32"):
        return model.dtype, "the checkpoint's"
    return "bfloat16", f"the checkpoint's {model.dtype} is not computed in"


def _limits(server: ServerConfig, model: ModelFacts, device: DeviceFacts) -> Limits:
    asked, chunk = server.context_length, server.chunked_prefill_size
    if asked is not None and asked > model.context_length:
        raise StartupError(f"--context-length is {asked}; the checkpoint's positions end at {model.context_length}")
    if chunk == 0:
        raise StartupError("--chunked-prefill-size is 0; give a number of tokens, or -1 for prompts in one piece")
    context = asked or model.context_length
    return Limits(
        context=context,
        running=server.max_running_requests or RUNNING_REQUESTS[device.device],
        chunk=context if chunk == -1 else min(chunk or CHUNK_TOKENS[device.device], context),
        in_flight=1 if server.disable_overlap_schedule else 2,
    )


def memory_of(server: ServerConfig, device: DeviceFacts) -> int:
    """Bytes that the plan may fill over all ranks: on a CPU they share one memory, each GPU has its own."""
    share = MEMORY_SHARE[device.device] if server.mem_fraction_static is None else server.mem_fraction_static
    return int(device.memory_bytes * share) * (1 if device.device == "cpu" else server.tp_size)


def _room(server: ServerConfig, weights: dict[str, int], kept: dict[str, int], dtype: str, device: DeviceFacts) -> int:
    """Bytes that are left for KV."""
    filled = memory_of(server, device)
    room = filled - sum(weights.values()) - sum(kept.values())
    if room <= 0:
        beside = "".join(f", {part} {human(size)}" for part, size in kept.items())
        raise StartupError(
            f"the weights need {human(sum(weights.values()))} in {dtype}{beside}; "
            f"{human(filled)} of {human(device.memory_bytes)} may be filled"
        )
    return room


def _context(server: ServerConfig, model: ModelFacts, pools: Pools) -> tuple[int, str]:
    asked, held = server.context_length, pools.full_tokens
    if asked is not None:
        if asked > held:
            raise StartupError(f"--context-length is {asked}; the full KV pool holds {held} tokens ({pools.reason})")
        return asked, "--context-length"
    if model.context_length > held:
        return held, f"all that the KV pool holds ({pools.reason}); the checkpoint's is {model.context_length}"
    return model.context_length, "the checkpoint's"


def _groups(request: PoolRequest, pools: Pools, ranks: int) -> tuple[GroupPlan, ...]:
    return tuple(
        GroupPlan(
            name=group.name,
            layers=group.layers,
            window=group.window,
            kv_heads=group.kv_heads,
            head_dim=group.head_dim,
            pages=pools.pages[group.name],
            page_bytes=request.page_bytes(group) // ranks,
        )
        for group in request.groups
    )
