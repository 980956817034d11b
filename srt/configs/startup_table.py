"""The table that `server launch` prints: what was resolved, to what, why, and the bytes of each part."""

from __future__ import annotations

import msgspec

from srt.configs.census import PLAIN
from srt.configs.plan import Choice, GroupPlan, RuntimePlan


class Reasons(msgspec.Struct, frozen=True):
    """Why values are what they are, where the plan alone does not tell."""

    dtype: str
    context: str
    pools: str
    running_wanted: int
    drafting: str


def human(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _flag_or(value: object, flag: str, otherwise: str) -> str:
    return otherwise if value is None else flag


def _asked(value: str, flag: str) -> str:
    return "the checkpoint's" if value == "auto" else flag


def startup_table(plan: RuntimePlan, reasons: Reasons) -> tuple[Choice, ...]:
    """The start-up table: what was resolved, to what, why, and the bytes of each part."""
    rows = [*_work_rows(plan, reasons), *_limit_rows(plan, reasons)]
    return (*rows, *(_image_rows(plan) if plan.model.has_vision else ()), *byte_rows(plan, reasons.pools))


def _kv_reason(plan: RuntimePlan) -> str:
    if plan.kv_dtype == plan.dtype:
        return "--dtype"
    return "--kv-cache-dtype; " + ("scales from the checkpoint" if plan.model.kv_scales else "scale 1.0 for all layers")


def _work_rows(plan: RuntimePlan, reasons: Reasons) -> list[Choice]:
    server, device = plan.server, plan.device
    used = server.tp_size if device.device == "cuda" else 0
    why = f", {device.unused_because}" if device.unused_because else ""
    idle = f"; {device.cuda_devices - used} NVIDIA device(s) unused{why}" if device.cuda_devices > used else ""
    asked = "--device" if server.device != "auto" else "auto"
    return [
        Choice("model", server.model_path, _model_reason(plan)),
        Choice("device", device.device, f"{asked}: {device.name}, {human(device.memory_bytes)} free{idle}"),
        Choice("tensor parallel", str(server.tp_size), "--tp-size"),
        Choice("threads a worker", str(plan.worker_threads), f"{device.cores} cores / {server.tp_size} workers"),
        Choice("dtype", plan.dtype, reasons.dtype),
        Choice("KV dtype", plan.kv_dtype, _kv_reason(plan)),
        Choice("load format", server.load_format, "--load-format"),
        Choice("context length", f"{plan.context_length} tokens", reasons.context),
        Choice(
            "reasoning format", plan.reasoning_format or "none", _asked(server.reasoning_parser, "--reasoning-parser")
        ),
        Choice("tool call format", plan.call_format or "none", _asked(server.tool_call_parser, "--tool-call-parser")),
        Choice("random seed", str(plan.random_seed), _flag_or(server.random_seed, "--random-seed", "drawn at start")),
    ]


def _largest_step(plan: RuntimePlan) -> str:
    guesses = f" and {plan.drafting.drafts} guesses" if plan.drafting.drafts else ""
    return f"one chunk, and one token{guesses} of each running request"


def _drafting(plan: RuntimePlan) -> str:
    traits = plan.drafting
    return f"{traits.algorithm}, {traits.drafts} tokens ahead" if traits.drafts else traits.algorithm


def _model_reason(plan: RuntimePlan) -> str:
    family = f"{plan.model.architecture}, {plan.model.model_type}"
    return family if plan.model.path == plan.server.model_path else f"{family}; {plan.model.path}"


def _limit_rows(plan: RuntimePlan, reasons: Reasons) -> list[Choice]:
    server = plan.server
    running = _flag_or(server.max_running_requests, "--max-running-requests", f"default on a {plan.device.kind}")
    if plan.max_running_requests < reasons.running_wanted:
        running += ", cut to one page each"
    chunk = _flag_or(server.chunked_prefill_size, "--chunked-prefill-size", f"default on a {plan.device.kind}")
    overlap = "--disable-overlap-schedule" if server.disable_overlap_schedule else "the next step is planned ahead"
    return [
        Choice("running requests", str(plan.max_running_requests), running),
        Choice("queued requests", str(plan.max_queued_requests), "--max-queued-requests"),
        Choice("prefill chunk", f"{plan.chunked_prefill_size} tokens", chunk),
        Choice("largest step", f"{plan.max_step_tokens} tokens", _largest_step(plan)),
        Choice("speculative decoding", _drafting(plan), reasons.drafting),
        Choice("steps in flight", str(plan.steps_in_flight), overlap),
        Choice("schedule policy", server.schedule_policy, "--schedule-policy"),
        Choice(
            "prefix cache",
            "off" if server.disable_radix_cache else "on",
            "--disable-radix-cache" if server.disable_radix_cache else "pages of ended requests are kept until needed",
        ),
        Choice("page size", f"{plan.page_size} tokens", "--page-size"),
    ]


def _image_rows(plan: RuntimePlan) -> list[Choice]:
    server = plan.server
    rule = {"vendor": "as published with the model", "hf": "as transformers does"}[server.image_preprocessing]
    limits = f"{human(server.max_image_bytes)}, {server.max_image_pixels} pixels, {server.max_image_seconds:g} s each"
    return [
        Choice("image preprocessing", server.image_preprocessing, rule),
        Choice("image processes", str(plan.image_processes), "one a core, 4 at most"),
        Choice("image limits", f"{server.max_images_per_request} a request", limits),
        Choice("remote images", server.allowed_media_domains or "none", "--allowed-media-domains"),
    ]


def byte_rows(plan: RuntimePlan, pools_reason: str) -> list[Choice]:
    """The memory of all ranks, part by part, and its sum."""
    ranks, groups = plan.server.tp_size, {f"KV: {group.name}": group for group in plan.groups}
    rows = []
    for part, size in plan.memory.items():
        why = _pool(plan, groups[part], pools_reason) if part in groups else _part_reason(plan, part)
        rows.append(Choice(part, human(size), f"{why}{', all ranks' if ranks > 1 else ''}"))
    loaded = {part.removeprefix("weights: ") for part in plan.memory}
    rows += [
        Choice(f"weights: {part}", human(0), f"{human(size)} in the checkpoint, not asked for")
        for part, size in plan.model.weight_bytes.items()
        if part not in loaded and part != "text" and size
    ]
    total = sum(plan.memory.values())
    return [
        *rows,
        Choice("sum", human(total), f"of {human(plan.device.memory_bytes)} free; KV is touched as it is used"),
    ]


def _part_reason(plan: RuntimePlan, part: str) -> str:
    """What a part of the memory is."""
    match part.removeprefix("weights: "):
        case "routed experts" if plan.model.experts != PLAIN:
            return f"in {plan.model.experts}"
        case "routers":
            return "in float32"
        case "mtp":
            return f"in {plan.dtype}, {plan.drafting.modules} modules"
        case "position tables":
            return f"rotations of {plan.context_length} positions in float32"
        case "image features":
            return "--encoder-cache-bytes, on each rank"
        case "rows":
            return f"tokens and page tables of {plan.max_running_requests} requests"
        case "largest step":
            return f"activations of {plan.max_step_tokens} tokens{' or of images' * plan.model.has_vision}, and logits"
        case "graphs":
            return "steps recorded while the server is idle; estimated"
        case "driver":
            return "CUDA's context, libraries and their kernels; estimated"
        case _:
            return f"in {plan.dtype}"


def _pool(plan: RuntimePlan, group: GroupPlan, reason: str) -> str:
    """What a KV pool holds, and why so much."""
    tokens = group.pages * plan.page_size
    kind = "every token" if group.window is None else f"window {group.window}"
    why = reason if group.window is None else _sliding_reason(plan, tokens)
    return (
        f"{tokens} tokens in {group.pages} pages of {human(group.page_bytes * plan.server.tp_size)}; "
        f"{len(group.layers)} layers, {kind}; {why}"
    )


def _sliding_reason(plan: RuntimePlan, tokens: int) -> str:
    if plan.server.swa_full_tokens_ratio is not None:
        return "--swa-full-tokens-ratio"
    if tokens >= plan.max_total_tokens:
        return "as many as the full pool, so that each cached prefix can keep its window"
    return "what memory is left"
