"""From flags, checkpoint and machine to the plan."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srt.configs.memory import check_split
from srt.configs.plan import DeviceFacts, KVGroupSpec, ModelFacts, RuntimePlan, WeightKind
from srt.configs.pools import CPU_KV_BYTES
from srt.configs.resolve import MEMORY_SHARE, resolve
from srt.configs.server import ServerConfig
from srt.configs.startup_table import human
from srt.errors import StartupError
from tests.support.resolved import DEVICE, MODEL, PLAIN, kinds, make_plan


def group(plan: RuntimePlan, name: str) -> int:
    """Tokens of a group's pool."""
    return next(group.pages for group in plan.groups if group.name == name) * plan.page_size


def row(plan: RuntimePlan, name: str) -> str:
    """Value and reason of a row of the start-up table."""
    choice = next(choice for choice in plan.table if choice.name == name)
    return f"{choice.value} because {choice.reason}"


def with_memory(size: int, **options: Any) -> RuntimePlan:
    """The plan on a machine with `size` bytes."""
    device = msgspec.structs.replace(DEVICE, memory_bytes=size)
    return resolve(ServerConfig(**PLAIN | options), MODEL, device)


def test_defaults_on_a_cpu() -> None:
    plan = make_plan()
    assert (plan.dtype, plan.page_size, plan.context_length) == ("bfloat16", 16, 8192)
    assert (plan.max_running_requests, plan.max_queued_requests) == (64, 512)
    assert (plan.chunked_prefill_size, plan.max_step_tokens) == (512, 576)
    assert (plan.steps_in_flight, plan.worker_threads, plan.random_seed) == (2, 4, 11)


def test_defaults_on_a_gpu() -> None:
    device = msgspec.structs.replace(DEVICE, device="cuda", memory_bytes=80 << 30, cuda_devices=2)
    plan = resolve(ServerConfig(**PLAIN), MODEL, device)
    assert (plan.max_running_requests, plan.chunked_prefill_size) == (256, 8192)
    used = plan.model.weight_bytes["text"] + sum((each.pages + 1) * each.page_bytes for each in plan.groups)
    assert 0.8 < used / device.memory_bytes < MEMORY_SHARE["cuda"]
    two = resolve(ServerConfig(**PLAIN | {"tp_size": 2}), MODEL, device)
    assert two.max_total_tokens > 1.9 * plan.max_total_tokens
    with pytest.raises(StartupError, match="--tp-size is 4; 2 GPUs are there"):
        resolve(ServerConfig(**PLAIN | {"tp_size": 4}), MODEL, device)


def test_kv_memory_is_half_a_gibibyte_where_that_is_enough() -> None:
    plan = make_plan()
    size = sum((each.pages + 1) * each.page_bytes for each in plan.groups)
    assert 0.99 * CPU_KV_BYTES < size <= CPU_KV_BYTES
    assert group(plan, "sliding") == group(plan, "full") == plan.max_total_tokens


def test_total_tokens_are_those_of_the_full_pool_floored_to_pages() -> None:
    plan = make_plan(max_total_tokens=1000)
    assert plan.max_total_tokens == group(plan, "full") == 992
    assert group(plan, "sliding") == 992


def test_a_context_that_the_pool_cannot_hold_is_cut_and_the_table_says_so() -> None:
    plan = make_plan(max_total_tokens=1000)
    assert plan.context_length == 992
    assert "the checkpoint's is 8192" in row(plan, "context length")


def test_half_a_sliding_pool_can_be_asked_for() -> None:
    plan = make_plan(max_total_tokens=8192, swa_full_tokens_ratio=0.5)
    assert group(plan, "sliding") == 4096


def test_a_sliding_pool_too_small_for_one_request_is_refused_with_both_numbers() -> None:
    with pytest.raises(StartupError, match=r"pool 816 tokens; one request needs 1120 .*window 64, 2 chunks of 512"):
        make_plan(max_total_tokens=8192, swa_full_tokens_ratio=0.1)


def test_less_memory_means_a_smaller_sliding_pool_before_a_shorter_context() -> None:
    # 512 bytes a token in the full group, 768 in the sliding one: 8192 tokens of both are 10 MiB.
    plan = with_memory(14_000_000)
    assert plan.context_length == 8192
    assert group(plan, "full") == 8192
    assert 1120 <= group(plan, "sliding") < 8192
    assert row(plan, "KV: sliding").endswith("what memory is left")


def test_little_memory_shortens_the_context() -> None:
    plan = with_memory(8_000_000)
    assert plan.context_length == group(plan, "full") < 8192
    assert "left after the weights" in row(plan, "context length")


def test_weights_that_do_not_fit_are_refused_with_both_numbers() -> None:
    with pytest.raises(StartupError, match=r"weights need 4\.8 MiB in bfloat16; 921\.6 KiB of 1\.0 MiB may be filled"):
        with_memory(1 << 20)


def test_tokens_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(StartupError, match=r"tokens of KV need .* are left after the weights; --max-total-tokens \d+"):
        with_memory(64 << 20, max_total_tokens=1_000_000)
    fitting = 16 * ((int((64 << 20) * MEMORY_SHARE["cpu"]) - 5_000_000 - 20480) // (1280 * 16))
    assert group(with_memory(64 << 20, max_total_tokens=fitting), "full") == fitting


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context_length": 9000}, "--context-length is 9000; the checkpoint's positions end at 8192"),
        ({"context_length": 4096, "max_total_tokens": 1024}, "--context-length is 4096; the full KV pool holds 1024"),
        ({"max_total_tokens": 8}, "--max-total-tokens is 8; one page holds 16 tokens"),
        ({"tp_size": 4}, "--tp-size is 4; the full layers have 2 KV heads"),
        ({"chunked_prefill_size": 0}, "--chunked-prefill-size is 0"),
    ],
)
def test_what_contradicts_itself_is_refused_with_both_numbers(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StartupError) as caught:
        make_plan(**options)
    assert sentence in str(caught.value)


def test_a_chunk_of_minus_one_is_the_whole_context() -> None:
    assert make_plan(chunked_prefill_size=-1).chunked_prefill_size == 8192


def test_a_small_context_makes_a_small_chunk() -> None:
    assert make_plan(context_length=100).chunked_prefill_size == 100


def test_without_overlap_one_step_is_in_flight() -> None:
    assert make_plan(disable_overlap_schedule=True).steps_in_flight == 1


def test_two_ranks_share_heads_threads_and_bytes() -> None:
    one, two = make_plan(), make_plan(tp_size=2)
    assert two.worker_threads == 2
    assert [each.page_bytes * 2 for each in two.groups] == [each.page_bytes for each in one.groups]
    assert [each.pages for each in two.groups] == [each.pages for each in one.groups]


def test_float32_doubles_weights_and_pages() -> None:
    one, two = make_plan(), make_plan(dtype="float32")
    assert [each.page_bytes for each in two.groups] == [each.page_bytes * 2 for each in one.groups]
    assert "9.5 MiB" in row(two, "weights: text")
    assert "4.8 MiB" in row(one, "weights: text")


def test_a_checkpoint_in_float16_is_computed_in_bfloat16() -> None:
    plan = resolve(ServerConfig(model_path="x"), msgspec.structs.replace(MODEL, dtype="float16"), DEVICE)
    assert plan.dtype == "bfloat16"
    assert "float16" in row(plan, "dtype")


def test_an_unknown_storage_format_is_refused() -> None:
    with pytest.raises(StartupError, match="stored in float8_e4m3fn"):
        resolve(ServerConfig(model_path="x"), msgspec.structs.replace(MODEL, dtype="float8_e4m3fn"), DEVICE)


def test_experts_that_clamp_elsewhere_are_refused_with_the_reason() -> None:
    with pytest.raises(StartupError, match="flashinfer_cutlass is refused: those kernels clamp before silu"):
        make_plan(moe_runner_backend="flashinfer_cutlass")


def test_a_share_of_the_memory_is_the_last_resort() -> None:
    with pytest.raises(StartupError, match=r"weights need 4\.8 MiB in bfloat16; 4\.0 MiB of 8\.0 MiB may be filled"):
        with_memory(8 << 20, mem_fraction_static=0.5)
    wide, narrow = (with_memory(64 << 20, mem_fraction_static=share) for share in (1.0, 0.5))
    assert sum(narrow.memory.values()) <= 32 << 20 < sum(wide.memory.values()) <= 64 << 20


def test_the_plan_names_every_part_and_the_table_adds_them_up() -> None:
    plan = make_plan(speculative_algorithm="mtp")
    assert list(plan.memory) == ["weights: text", "weights: mtp", "KV: full", "KV: sliding", "KV: draft"]
    assert row(plan, "sum").startswith(human(sum(plan.memory.values())))


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (10, 1), (8, 4), (2, 2)])
def test_coded_experts_split_at_whole_blocks(ranks: int, groups: int) -> None:
    wide = WeightKind("routed experts", 64, 1280, format="fp8", stack=8, split="columns")
    check_split(msgspec.structs.replace(MODEL, weights=(wide,)), ranks, groups)


@pytest.mark.parametrize(("ranks", "groups"), [(4, 1), (8, 2), (8, 1)])
def test_coded_experts_that_do_not_split_are_refused_before_anything_starts(ranks: int, groups: int) -> None:
    wide = WeightKind("routed experts", 64, 1280, format="fp8", stack=8, split="columns")
    parts = ranks // groups
    with pytest.raises(StartupError, match=rf"does not split over {parts} ranks .* it splits over 1, 2, 5, 10$"):
        check_split(msgspec.structs.replace(MODEL, weights=(wide,)), ranks, groups)


def test_a_given_seed_is_kept_and_a_drawn_one_is_printed() -> None:
    assert make_plan(random_seed=5).random_seed == 5
    assert row(make_plan(), "random seed") == "11 because drawn at start"


def test_an_unused_gpu_is_mentioned() -> None:
    plan = resolve(ServerConfig(model_path="x"), MODEL, msgspec.structs.replace(DEVICE, cuda_devices=2))
    assert "2 NVIDIA device(s) unused" in row(plan, "device")


def test_a_plan_survives_the_file_that_carries_it() -> None:
    plan = make_plan()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=RuntimePlan) == plan


models = st.builds(
    lambda full, sliding, heads, dim, window, context, text: ModelFacts(
        path="x",
        architecture="A",
        model_type="a",
        vocab_size=10,
        context_length=context,
        bos_token_id=0,
        eos_token_ids=(1,),
        groups=(
            KVGroupSpec("full", tuple(range(full)), None, heads, dim),
            KVGroupSpec("sliding", tuple(range(full, full + sliding)), window, heads, dim),
        ),
        weight_bytes={"text": 2 * text},
        weights=kinds(text=2 * text),
    ),
    full=st.integers(1, 12),
    sliding=st.integers(1, 33),
    heads=st.sampled_from([1, 2, 8]),
    dim=st.sampled_from([16, 64, 128]),
    window=st.integers(1, 1024),
    context=st.integers(2, 300_000),
    text=st.integers(1, 1 << 33),
)
devices = st.builds(DeviceFacts, st.just("cpu"), st.just("c"), st.integers(1 << 20, 1 << 36), st.integers(1, 64))
servers = st.builds(
    ServerConfig,
    model_path=st.just("x"),
    page_size=st.integers(1, 64),
    max_total_tokens=st.none() | st.integers(1, 1 << 22),
    max_running_requests=st.none() | st.integers(1, 4096),
    chunked_prefill_size=st.none() | st.sampled_from([-1]) | st.integers(1, 8192),
    swa_full_tokens_ratio=st.none() | st.floats(0.001, 1),
    context_length=st.none() | st.integers(2, 300_000),
    dtype=st.sampled_from(["auto", "bfloat16", "float32"]),
    disable_overlap_schedule=st.booleans(),
)


@given(servers, models, devices)
def test_every_plan_fits_its_machine_and_can_serve_a_request(
    server: ServerConfig, model: ModelFacts, device: DeviceFacts
) -> None:
    try:
        plan = resolve(server, model, device)
    except StartupError as error:
        assert "\n" not in str(error)
        return
    full, sliding = plan.groups
    weights = model.weight_bytes["text"] * (2 if plan.dtype == "float32" else 1)
    kv_bytes = sum((each.pages + 1) * each.page_bytes for each in plan.groups)
    assert weights + kv_bytes <= device.memory_bytes
    assert full.pages * plan.page_size == plan.max_total_tokens >= plan.context_length
    assert plan.context_length <= model.context_length
    assert 1 <= plan.max_running_requests <= min(full.pages, sliding.pages)
    assert 1 <= plan.chunked_prefill_size <= plan.context_length
    assert sliding.pages <= full.pages
    assert sliding.window is not None
    in_view = sliding.window + plan.steps_in_flight * plan.chunked_prefill_size
    assert sliding.pages * plan.page_size >= min(in_view, plan.max_total_tokens)
    assert all(choice.name and choice.value and choice.reason for choice in plan.table)


@given(servers, models, devices)
def test_resolving_is_pure(server: ServerConfig, model: ModelFacts, device: DeviceFacts) -> None:
    def outcome() -> RuntimePlan | str:
        try:
            return resolve(server, model, device)
        except StartupError as error:
            return str(error)

    assert outcome() == outcome()
