"""/metrics parses, carries the names that dashboards know, and adds up."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.front import Front

NAMES = {
    "num_running_reqs", "num_queue_reqs", "num_used_tokens", "token_usage", "full_token_usage", "swa_token_usage",
    "gen_throughput", "cache_hit_rate", "max_total_num_tokens", "max_total_num_tokens_swa", "kv_used_tokens",
    "kv_evictable_tokens", "kv_available_tokens", "swa_used_tokens", "page_size", "kv_cache_memory_usage_gb",
    "http_requests_active", "prompt_tokens", "generation_tokens", "cached_tokens", "num_requests",
    "num_aborted_requests", "num_retracted_requests",
    "num_retracted_input_tokens", "num_retracted_output_tokens", "evicted_tokens",
    "http_requests", "http_responses", "scheduler_idle_seconds", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "queue_time_seconds",
    "request_time_per_output_token_seconds", "prompt_tokens_histogram", "generation_tokens_histogram",
    "uncached_prompt_tokens_histogram", "startup_time_seconds", "requests_cancelled", "kv_pages_leaked",
    "scheduler_step_age_seconds", "warnings", "per_stage_req_latency_seconds", "weight_memory_usage_gb",
    "num_retracted_reqs", "new_token_ratio", "cancel_to_free_seconds", "startup_phase_seconds",
    "weight_load_duration_seconds", "cache_miss", "eviction_duration_seconds",
}  # fmt: skip


def test_the_exposition_parses_and_every_sample_names_the_model(front: Front) -> None:
    front.scheduler.report(
        leaked_pages=0,
        cancel_to_free_counts=(2, *[0] * 12, 1),
        cancel_to_free_s=7.5,
        eviction_counts=(4, *[0] * 9, 1),
        eviction_s=0.75,
        missed_tokens={"absent": 70},
        recorded_bytes=5 << 20,
    )
    front.wait_for(lambda: "num_used_tokens" in front.get("/metrics").text)
    answer = front.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name.removeprefix("sglang:") for name in families} >= NAMES
    for family in families.values():
        assert family.documentation
        assert all(sample.labels["model_name"] == "test-model" for sample in family.samples)
    assert front.metric("num_used_tokens") == 60
    assert (front.metric("kv_evictable_tokens"), front.metric("kv_available_tokens")) == (30, 900)
    assert front.metric("cancel_to_free_seconds_count") == front.metric("cancel_to_free_seconds_bucket", le="+Inf") == 3
    assert front.metric("cancel_to_free_seconds_sum") == 7.5
    assert (front.metric("eviction_duration_seconds_count"), front.metric("eviction_duration_seconds_sum")) == (5, 0.75)
    assert front.metric("cache_miss_total", reason="absent") == 70
    assert front.metric("graph_memory_bytes") == 5 << 20
    assert front.metric("weight_memory_usage_gb") == 0.004
    assert front.metric("startup_phase_seconds", phase="plan") == 0.5
    assert front.metric("weight_load_duration_seconds_sum") == 1.5
    assert (front.metric("swa_used_tokens"), front.metric("cache_hit_rate")) == (40, 0.25)


def test_sums_equal_what_clients_counted(front: Front) -> None:
    names = (
        "num_requests_total", "prompt_tokens_total", "generation_tokens_total", "e2e_request_latency_seconds_count",
        "prompt_tokens_histogram_sum", "generation_tokens_histogram_sum", "time_to_first_token_seconds_count",
    )  # fmt: skip
    before = {name: front.metric(name) for name in names}
    cached = front.metric("cached_tokens_total", cache_source="device")
    totals = {"prompt": 0, "completion": 0, "cached": 0}
    for stream in (False, True):
        for count in (1, 7, 20):
            params = {"max_new_tokens": count, "ignore_eos": True}
            body = {"input_ids": [5] * (count + 20), "sampling_params": params, "stream": stream}
            assert front.post("/generate", body).status == 200
            totals["prompt"] += count + 20
            totals["completion"] += count
            totals["cached"] += (count + 19) // 16 * 16
    grown = {name: front.metric(name) - value for name, value in before.items()}
    assert grown["num_requests_total"] == grown["e2e_request_latency_seconds_count"] == 6
    assert grown["time_to_first_token_seconds_count"] == 6
    assert grown["prompt_tokens_total"] == grown["prompt_tokens_histogram_sum"] == totals["prompt"]
    assert grown["generation_tokens_total"] == grown["generation_tokens_histogram_sum"] == totals["completion"]
    assert front.metric("cached_tokens_total", cache_source="device") - cached == totals["cached"]


def test_the_stages_of_requests_add_up_to_the_whole(front: Front) -> None:
    def total(stage: str) -> float:
        return front.metric("per_stage_req_latency_seconds_sum", stage=stage)

    stages = ("prefill_waiting", "prefill_forward", "decode_forward")
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 9}}
    assert front.post("/generate", body).status == 200
    before = {stage: total(stage) for stage in stages}
    answer = front.post("/generate", body).json["meta_info"]
    grown = {stage: total(stage) - before[stage] for stage in stages}
    assert grown["prefill_waiting"] == pytest.approx(answer["queue_time"], abs=1e-6)
    assert grown["prefill_waiting"] + grown["prefill_forward"] == pytest.approx(answer["first_token_latency"], abs=1e-6)
    assert 0 < sum(grown.values()) < answer["e2e_latency"]


def test_routes_that_do_not_exist_share_one_label(front: Front) -> None:
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        front.get(path)
    text = front.get("/metrics").text
    assert 'endpoint="/a"' not in text
    assert 'endpoint="/v1/models/x"' not in text
    assert front.metric("http_responses_total", endpoint="other", status_code="404") >= 2
    assert front.metric("http_responses_total", endpoint="/v1/models/{model}", status_code="404") >= 2
