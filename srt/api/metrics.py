"""What `/metrics` tells, in Prometheus' text format and under the names that dashboards of this field know.

Counting is plain arithmetic on the hot path; samples are made when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from srt.api.tickets import PromptCounts, Stream
from srt.configs.plan import RuntimePlan
from srt.heartbeat import Age
from srt.messages import CANCEL_TO_FREE_BOUNDS_S, EVICTION_BOUNDS_S, GroupUsage, SchedulerStats, Timing

PREFIX: Final = "sglang:"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SECONDS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200,
    400, 600, 1000,
)  # fmt: skip
GAP_SECONDS: Final = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8,
    1, 2, 4, 6, 8,
)  # fmt: skip
TOKENS: Final = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
)  # fmt: skip


STAGES: Final = ("prefill_waiting", "prefill_forward", "decode_forward")
"""From received to first step, to first token, to end."""


class Distribution:
    """A histogram."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add a value, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def family(self, name: str, text: str, model: str) -> HistogramMetricFamily:
        """The samples of this histogram."""
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
        self.add_to(family, model)
        return family

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        """Its samples as one of several histograms of a family."""
        family.add_metric(list(labels), cumulated(self._bounds, self._counts), self._total)


def cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: each counts everything up to its upper bound."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))


class Metrics:
    """Everything that this process counts, and the last report of the scheduler."""

    def __init__(self) -> None:
        self.requests = 0
        self.aborted = 0
        self.http_active = 0
        self.http: Counter[tuple[str, str, int]] = Counter()
        """Responses by route, method and status."""
        self.cancelled: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.prompt = PromptCounts()
        self.generated_tokens = 0
        self.stats: SchedulerStats | None = None
        self.startup_s = 0.0
        self.startup_phases_s: dict[str, float] = {}
        self.first_token = Distribution(SECONDS)
        self.inter_token = Distribution(GAP_SECONDS)
        self.ends = RequestDistributions()

    def observe_end(self, stream: Stream, now: float) -> None:
        """A request got its ending."""
        finish, timing = stream.finish, stream.timing
        if finish is not None and finish.kind == "abort":
            self.aborted += 1
        self.prompt.add(stream.prompt)
        if timing is not None and stream.completion_tokens and not stream.ticket.request.stream:
            self.first_token.observe(timing.first_token_s)
        self.ends.observe(stream, now)

    def observe_cancel(self, stream: Stream) -> None:
        """The client of a request went away before its end."""
        self.aborted += 1
        if not stream.ticket.request.stream:
            self.cancelled["not_streamed"] += 1
        else:
            self.cancelled["streaming" if stream.first_at else "before_first_token"] += 1


class RequestDistributions:
    """What is observed once a request."""

    def __init__(self) -> None:
        self._e2e = Distribution(SECONDS)
        self._queue = Distribution(SECONDS)
        self._per_token = Distribution(GAP_SECONDS)
        self._prompt = Distribution(TOKENS)
        self._uncached = Distribution(TOKENS)
        self._generation = Distribution(TOKENS)
        self._stages = {stage: Distribution(SECONDS) for stage in STAGES}

    def observe(self, stream: Stream, now: float) -> None:
        """A request got its ending."""
        count = stream.completion_tokens
        self._e2e.observe(now - stream.ticket.started_at)
        if stream.timing is not None:
            self._queue.observe(stream.timing.queue_s)
            self._observe_stages(stream.timing, count)
        if stream.ticket.request.stream and count > 1:
            self._per_token.observe((now - stream.first_at) / (count - 1))
        self._prompt.observe(stream.prompt.tokens)
        self._uncached.observe(stream.prompt.tokens - stream.prompt.cached_tokens)
        self._generation.observe(count)

    def _observe_stages(self, timing: Timing, count: int) -> None:
        """A request without a token has spent all its time before the first one."""
        first_s = timing.first_token_s if count else timing.total_s
        self._stages["prefill_waiting"].observe(timing.queue_s)
        self._stages["prefill_forward"].observe(max(0.0, first_s - timing.queue_s))
        self._stages["decode_forward"].observe(max(0.0, timing.total_s - first_s))

    def families(self, model: str) -> Iterator[Metric]:
        """Samples of all histograms."""
        stages = HistogramMetricFamily(
            PREFIX + "per_stage_req_latency_seconds", "Time of a request by stage.", labels=["model_name", "stage"]
        )
        for stage, distribution in self._stages.items():
            distribution.add_to(stages, model, stage)
        yield stages
        yield self._e2e.family("e2e_request_latency_seconds", "From request to end of the answer.", model)
        yield self._queue.family("queue_time_seconds", "Waiting for the first step.", model)
        yield self._per_token.family("request_time_per_output_token_seconds", "Mean gap of a streamed answer.", model)
        yield self._prompt.family("prompt_tokens_histogram", "Tokens of prompts.", model)
        yield self._uncached.family("uncached_prompt_tokens_histogram", "Tokens of prompts that were computed.", model)
        yield self._generation.family("generation_tokens_histogram", "Tokens of answers.", model)


class Exposition(Collector):
    """Metrics as samples with the label `model_name`."""

    def __init__(self, metrics: Metrics, plan: RuntimePlan, model: str) -> None:
        self._metrics = metrics
        self._plan = plan
        self._model = model
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.ages: list[Age] = []

    def text(self, ages: list[Age]) -> bytes:
        """The answer to a scrape. `ages` are the signs of life on the board."""
        self.ages = ages
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All samples of now."""
        metrics = self._metrics
        yield from self._requests()
        yield from self._http()
        yield metrics.first_token.family("time_to_first_token_seconds", "From request to first token.", self._model)
        yield metrics.inter_token.family("inter_token_latency_seconds", "Gap between tokens of a stream.", self._model)
        yield from metrics.ends.families(self._model)
        yield from self._constants()
        yield self._labelled_gauge(
            "scheduler_step_age_seconds",
            "How long the step that a process is in has been going on; 0 between steps.",
            "process",
            ((age.name, age.step_s or 0.0) for age in self.ages),
        )
        if metrics.stats is not None:
            yield from self._scheduler(metrics.stats)
            yield from self._pools(metrics.stats)
            yield from self._speculation(metrics.stats)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _labelled_gauge(self, name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", label])
        for key, value in values:
            family.add_metric([self._model, key], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _labelled(self, name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", label])
        for key, value in values:
            family.add_metric([self._model, key], value)
        return family

    def _counted(
        self, name: str, text: str, bounds: tuple[float, ...], counts: tuple[int, ...], total: float
    ) -> Metric:
        """A histogram that another process counts; empty until it has told."""
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
        if counts:
            family.add_metric([self._model], cumulated(bounds, counts), total)
        return family

    def _requests(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield self._counter("num_requests", "Prompts taken.", metrics.requests)
        yield self._counter("num_aborted_requests", "Requests that ended early.", metrics.aborted)
        yield self._labelled(
            "requests_cancelled",
            "Requests whose client went away, by what it had seen of the answer.",
            "phase",
            ((phase, metrics.cancelled[phase]) for phase in ("before_first_token", "streaming", "not_streamed")),
        )
        yield self._counter("prompt_tokens", "Prompt tokens of ended requests.", metrics.prompt.tokens)
        yield self._counter("images", "Images of ended requests.", metrics.prompt.images)
        yield self._counter("image_tokens", "Prompt tokens of images of ended requests.", metrics.prompt.image_tokens)
        yield self._counter("generation_tokens", "Tokens of answers.", metrics.generated_tokens)
        yield self._labelled(
            "cached_tokens",
            "Prompt tokens that were not computed, by where their KV came from.",
            "cache_source",
            ((source, metrics.prompt.cached_tokens) for source in ("device", "total")),
        )
        yield self._labelled(
            "warnings",
            "Request fields that were ignored.",
            "kind",
            ((kind, metrics.warnings[kind]) for kind in ("unknown_field", "ignored_field")),
        )

    def _http(self) -> Iterator[Metric]:
        labels = ["model_name", "endpoint", "method"]
        asked: Counter[tuple[str, str]] = Counter()
        responses = CounterMetricFamily(PREFIX + "http_responses", "Responses.", labels=[*labels, "status_code"])
        for (path, method, status), count in sorted(self._metrics.http.items()):
            asked[path, method] += count
            responses.add_metric([self._model, path, method, str(status)], count)
        requests = CounterMetricFamily(PREFIX + "http_requests", "Requests that were answered.", labels=labels)
        for (path, method), count in sorted(asked.items()):
            requests.add_metric([self._model, path, method], count)
        yield requests
        yield responses
        yield self._gauge("http_requests_active", "Requests being answered.", self._metrics.http_active)

    def _constants(self) -> Iterator[Metric]:
        plan = self._plan
        pools = sum((group.pages + 1) * group.page_bytes for group in plan.groups)
        yield self._gauge("page_size", "Tokens of a KV page.", plan.page_size)
        weights = sum(size for part, size in plan.memory.items() if part.startswith("weights: "))
        yield self._gauge("weight_memory_usage_gb", "Weights over all ranks, as planned, in GB.", weights / 1e9)
        yield self._gauge("kv_cache_memory_usage_gb", "KV pools of one rank, in GB.", pools / 1e9)
        yield self._gauge("startup_time_seconds", "From the start of this process to ready.", self._metrics.startup_s)
        phases = self._metrics.startup_phases_s
        yield self._labelled_gauge(
            "startup_phase_seconds", "Phases of the start, up to the last worker.", "phase", phases.items()
        )
        loaded = Distribution(SECONDS)
        if "weights" in phases:
            loaded.observe(phases["weights"])
        yield loaded.family("weight_load_duration_seconds", "Loading the weights.", self._model)

    def _scheduler(self, stats: SchedulerStats) -> Iterator[Metric]:
        asked = stats.cache_queries_tokens
        yield self._gauge("num_running_reqs", "Requests that compute.", stats.running)
        yield self._gauge("num_queue_reqs", "Requests that wait.", stats.queued)
        yield self._gauge("gen_throughput", "Tokens generated a second.", stats.gen_throughput)
        yield self._gauge(
            "cache_hit_rate", "Prompt tokens found in the cache.", stats.cache_hit_tokens / asked if asked else 0
        )
        yield self._gauge("graph_memory_bytes", "GPU memory of recorded steps.", stats.recorded_bytes)
        yield self._gauge("kv_pages_leaked", "Pages without an owner; more than 0 is a bug.", stats.leaked_pages)
        yield self._gauge("num_retracted_reqs", "Retracted requests that wait.", stats.retracted_waiting)
        yield self._gauge(
            "new_token_ratio", "Share of its new tokens that a request is expected to use.", stats.new_token_ratio
        )
        yield self._labelled(
            "cache_miss", "Prompt tokens not found in the cache, by why.", "reason", stats.missed_tokens.items()
        )
        yield self._counted(
            "cancel_to_free_seconds", "From a cancellation to free pages.",
            CANCEL_TO_FREE_BOUNDS_S, stats.cancel_to_free_counts, stats.cancel_to_free_s,
        )  # fmt: skip
        yield self._counted(
            "eviction_duration_seconds", "Dropping cached pages to make room.",
            EVICTION_BOUNDS_S, stats.eviction_counts, stats.eviction_s,
        )  # fmt: skip
        yield self._counter("num_retracted_requests", "Retractions.", stats.retracted_requests)
        yield self._counter("num_retracted_input_tokens", "Prompt tokens retracted.", stats.retracted_input_tokens)
        yield self._counter("num_retracted_output_tokens", "Generated tokens retracted.", stats.retracted_output_tokens)
        yield self._counter("evicted_tokens", "Tokens that the cache dropped.", stats.evicted_tokens)
        yield self._counter("images_encoded", "Images that the tower computed.", stats.images_encoded)
        yield self._counter("image_batches", "Runs of the image tower.", stats.image_batches)
        yield self._counter("image_encode_seconds", "Time in the image tower.", stats.image_encode_s)
        yield self._counter(
            "encoder_cache_hits", "Images whose features were there when a row needed them.", stats.image_cache_hits
        )
        yield self._counter("scheduler_steps", "Forward passes.", stats.steps)
        yield self._counter("scheduler_idle_seconds", "Time without a step.", stats.idle_s)

    def _speculation(self, stats: SchedulerStats) -> Iterator[Metric]:
        """Absent from a server that does not guess; else from the first step with guesses on."""
        counts = stats.speculation
        if counts is None:
            return
        right = [sum(counts.histogram[position + 1 :]) for position in range(len(counts.histogram) - 1)]
        yield self._gauge(
            "spec_accept_length", "Tokens a step that checked guesses.", 1 + counts.accepted / counts.steps
        )
        yield self._gauge("spec_accept_rate", "Share of guesses that were right.", counts.accepted / counts.drafted)
        yield self._counter("spec_verify_steps", "Steps of a request that checked guesses.", counts.steps)
        yield self._counter("spec_plain_steps", "Steps of a request that brought a token without.", counts.plain)
        yield self._counter("spec_draft_tokens", "Guesses that were checked.", counts.drafted)
        yield self._counter("spec_accepted_tokens", "Guesses that were right.", counts.accepted)
        yield self._labelled(
            "spec_accepted_tokens_per_position",
            "Guesses that were right, by place in their chain.",
            "position",
            ((str(position), count) for position, count in enumerate(right)),
        )

    def _pools(self, stats: SchedulerStats) -> Iterator[Metric]:
        for group in stats.groups:
            # The draft modules' pool is as large as the sliding one and lives with it; dashboards know no third.
            if group.name == "sliding":
                yield from self._sliding_pool(group)
            elif group.name == "full":
                yield from self._full_pool(group)

    def _full_pool(self, group: GroupUsage) -> Iterator[Metric]:
        usage = group.request_tokens / group.total_tokens if group.total_tokens else 0.0
        yield self._gauge("max_total_num_tokens", "Tokens that the KV pool holds.", group.total_tokens)
        yield self._gauge("num_used_tokens", "Tokens held by requests.", group.request_tokens)
        yield self._gauge("token_usage", "Share of the pool held by requests.", usage)
        yield self._gauge("full_token_usage", "Share of the full-attention pool held by requests.", usage)
        yield self._gauge(
            "kv_used_tokens", "Tokens held by requests or the cache.", group.request_tokens + group.tree_tokens
        )
        yield self._gauge("kv_evictable_tokens", "Tokens that only the cache holds.", group.evictable_tokens)
        yield self._gauge("kv_available_tokens", "Free tokens.", group.free_tokens)

    def _sliding_pool(self, group: GroupUsage) -> Iterator[Metric]:
        usage = group.request_tokens / group.total_tokens if group.total_tokens else 0.0
        yield self._gauge("max_total_num_tokens_swa", "Tokens that the sliding KV pool holds.", group.total_tokens)
        yield self._gauge("swa_used_tokens", "Tokens of the sliding pool held by requests.", group.request_tokens)
        yield self._gauge("swa_token_usage", "Share of the sliding pool held by requests.", usage)
        yield self._gauge(
            "swa_evictable_tokens", "Tokens of the sliding pool that only the cache holds.", group.evictable_tokens
        )
        yield self._gauge("swa_available_tokens", "Free tokens of the sliding pool.", group.free_tokens)
