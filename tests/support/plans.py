"""Runtime plans for parts that run without a model."""

from __future__ import annotations

from srt.configs.plan import DeviceFacts, DraftTraits, GroupPlan, ModelFacts, RuntimePlan
from srt.configs.server import ServerConfig


def runtime_plan(
    *,
    page_size: int = 4,
    window: int = 8,
    full_pages: int = 64,
    sliding_pages: int = 64,
    rows: int = 8,
    queued: int = 512,
    chunk: int = 16,
    step_tokens: int | None = None,
    context: int = 4096,
    overlap: bool = True,
    radix: bool = True,
    policy: str = "fcfs",
    watchdog_s: float = 300.0,
    drafts: int = 0,
    modules: int = 0,
    draft_pages: int | None = None,
) -> RuntimePlan:
    """A plan with two KV groups, full and sliding, of which the scheduler reads only sizes and switches.

    With draft modules there is a third one, whose layers see as much as the sliding ones.
    """
    server = ServerConfig(
        model_path="none",
        page_size=page_size,
        schedule_policy=policy,
        disable_radix_cache=not radix,
        disable_overlap_schedule=not overlap,
        watchdog_timeout=watchdog_s,
    )
    facts = ModelFacts("none", "None", "none", 48, context, None, (), (), {})
    groups: tuple[GroupPlan, ...] = (
        GroupPlan("full", (0,), None, 1, 1, full_pages, 1),
        GroupPlan("sliding", (1,), window, 1, 1, sliding_pages, 1),
    )
    if modules:
        pages = sliding_pages if draft_pages is None else draft_pages
        groups = (*groups, GroupPlan("draft", (2,), window + modules - 1, 1, 1, pages, 1))
    return RuntimePlan(
        server=server,
        model=facts,
        device=DeviceFacts("cpu", "none", 1, 1),
        dtype="float32",
        kv_dtype="float32",
        page_size=page_size,
        context_length=context,
        max_total_tokens=full_pages * page_size,
        groups=groups,
        max_running_requests=rows,
        max_queued_requests=queued,
        chunked_prefill_size=chunk,
        max_step_tokens=step_tokens or chunk + rows * (1 + drafts),
        steps_in_flight=2 if overlap else 1,
        worker_threads=1,
        random_seed=0,
        drafting=DraftTraits("mtp" if modules else "ngram" if drafts else "off", drafts, modules, look_ahead=modules),
    )
