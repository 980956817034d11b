"""Native CPU kernels beside torch, at the shapes of a small checkpoint: microseconds a call, best and median.

    python -m benchmarks.cpu_kernels [--threads 2 | --cpu-time] [--rows 1 4 16 64 512] [--seconds 0.4] [--json FILE]

Every call takes the next of several copies of its weights, 96 MiB in all, so that weights come from memory as they do
in a model that does not fit the processor's cache. Calls are timed as the model makes them, from Python. On a machine
that others use too, `--cpu-time` counts the processor time of one thread instead of what the clock on the wall says.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from srt.layers.attention.contract import AttentionSpec
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cpu.attention import CpuAttention
from srt.layers.cpu.build import default_cache
from srt.layers.cpu.experts import CpuExperts
from srt.layers.cpu.kernels import Kernels, load_kernels
from srt.layers.cpu.linear import CpuLinear
from srt.layers.cpu.ops import CpuOps
from srt.layers.linear import OneDnnLinear, PlainLinear
from srt.layers.moe.contract import ExpertShape, StoredExperts
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.ops import Choice, TorchOps
from srt.layers.quant.plain import Plain

HIDDEN, EXPERTS, CHOSEN, WIDTH = 512, 32, 4, 192
LINEARS = {"inputs, 8 heads": (1032, 512), "inputs, 12 heads": (1292, 512), "output": (512, 768)} | {
    "dense gate_up": (2816, 512),
    "dense down": (512, 1408),
    "lm_head": (8192, 512),
}
WEIGHT_BYTES = 96 * 2**20
HEAD_DIM, KV_HEADS, PAGE_SIZE = 64, 4, 16


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    kernel: str
    rows: int
    native_best: float
    native_median: float
    torch_best: float
    torch_median: float


def time_call(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """(best, median) microseconds of at least 5 calls, more while time lasts."""
    time.sleep(0.02)  # the other side's threads go to sleep
    call()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < until:
        began = clock()
        call()
        taken.append((clock() - began) * 1e6)
    return min(taken), median(taken)


def copies_of(size: int) -> int:
    """How many copies of `size` bytes no cache holds."""
    return max(2, WEIGHT_BYTES // size)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def linear_calls(kernels: Kernels, rows: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    native = CpuLinear(kernels)
    reference = OneDnnLinear() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else PlainLinear()
    for name, (outputs, inputs) in LINEARS.items():
        weights = [random(outputs, inputs) for _ in range(copies_of(outputs * inputs * 2))]
        x = random(rows, inputs)
        ours = cycle([native.pack(weight) for weight in weights])
        theirs = cycle([reference.pack(weight) for weight in weights])
        yield (
            f"linear {name}",
            lambda x=x, ours=ours: native.matmul(x, next(ours)),  # type: ignore[misc]
            lambda x=x, theirs=theirs: reference.matmul(x, next(theirs)),  # type: ignore[misc]
        )


def random_experts(count: int) -> StoredExperts:
    """Weights of `count` experts, as a checkpoint stores them."""
    plain = Plain()
    gate_up, down = random(count, 2 * WIDTH, HIDDEN) * 0.05, random(count, HIDDEN, WIDTH) * 0.05
    return StoredExperts(plain.pack(gate_up), plain.pack(down))


def expert_calls(kernels: Kernels, rows: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    native, reference = CpuExperts(Plain(), kernels), ReferenceExperts(Plain())
    shape, shared_shape = ExpertShape(EXPERTS, HIDDEN, WIDTH, None), ExpertShape(1, HIDDEN, WIDTH, None)
    layer = EXPERTS * 3 * WIDTH * HIDDEN * 2
    layers = [random_experts(EXPERTS) for _ in range(copies_of(layer))]
    x = random(rows, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(rows)]).to(torch.int32)
    choice = Choice(ids, torch.rand(rows, CHOSEN))
    ours = cycle([native.pack(experts, shape) for experts in layers])
    theirs = cycle([reference.pack(experts, shape) for experts in layers])
    shared = random_experts(1)
    our_shared, their_shared = native.pack_shared(shared, shared_shape), reference.pack_shared(shared, shared_shape)
    yield (
        "experts + shared",
        lambda: native.run_with_shared(x, lambda: choice, next(ours), our_shared),
        lambda: reference.run_with_shared(x, lambda: choice, next(theirs), their_shared),
    )


def op_calls(kernels: Kernels, rows: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    native, reference = CpuOps(kernels), TorchOps()
    x, residual, weight = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN)
    yield (
        "add + norm",
        lambda: native.add_rms_norm(x, residual, weight, 1e-5),
        lambda: reference.add_rms_norm(x, residual, weight, 1e-5),
    )
    gate_up = random(rows, 2816)
    yield "gated silu", lambda: native.gated_silu(gate_up, None), lambda: reference.gated_silu(gate_up, None)
    router, bias = torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS)
    packed = native.pack_router(router)
    yield (
        "router",
        lambda: native.route(x, packed, bias, top_k=CHOSEN, factor=3.0),
        lambda: reference.route(x, router, bias, top_k=CHOSEN, factor=3.0),
    )
    logits = random(rows, 8192)
    yield "greedy", lambda: native.sample_greedy(logits), lambda: reference.sample_greedy(logits)


def attention_batch(queries: int, keys: int, rows: int) -> tuple[ForwardBatch, KVLayer]:
    """`rows` rows of `queries` new tokens each, `keys` keys with them."""
    pages = -(-keys // PAGE_SIZE)
    tables = (torch.randperm(rows * pages) + 1).to(torch.int32).view(rows, pages)
    memory = [random(rows * pages + 1, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2)]
    positions = torch.arange(keys - queries, keys).repeat(rows)
    slots = (tables[:, positions[:queries] // PAGE_SIZE] * PAGE_SIZE + positions[:queries] % PAGE_SIZE).flatten().long()
    starts = torch.arange(rows + 1) * queries
    lens = torch.full((rows,), keys)
    batch = ForwardBatch(
        input_ids=torch.zeros(rows * queries, dtype=torch.int64),
        positions=positions,
        query_starts=starts.int(),
        query_starts_list=starts.tolist(),
        kv_lens=lens.int(),
        kv_lens_list=lens.tolist(),
        page_tables=(tables,),
        slots=(slots,),
        logit_tokens=starts[1:] - 1,
        page_size=PAGE_SIZE,
    )
    return batch, KVLayer(*memory)


def attention_calls(
    kernels: Kernels, rows: int, keys: int, queries: int = 1
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    for heads, window in ((8, None), (12, 256)):
        batch, kv = attention_batch(queries, keys, rows)
        spec = AttentionSpec(
            layer=0,
            group=0,
            q_heads=heads,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            rotary_dim=HEAD_DIM // 2,
            window=window,
            scale=HEAD_DIM**-0.5,
            q_norm=random(HEAD_DIM) * 0.1,
            k_norm=random(HEAD_DIM) * 0.1,
            rope=torch.randn(keys + 1, HEAD_DIM // 2),
            eps=1e-5,
        )
        qkv, gates = random(rows * queries, (heads + 2 * KV_HEADS) * HEAD_DIM), random(rows * queries, heads)
        native, reference = CpuAttention(kernels), ReferenceAttention()
        native.begin(batch)
        q = native.store(qkv, spec, kv, batch)
        kind = f"{heads} heads, {keys} keys" + (f", window {window}" if window else "")

        def call(
            backend: CpuAttention | ReferenceAttention, spec: AttentionSpec = spec, kv: KVLayer = kv, q: Tensor = q,
            batch: ForwardBatch = batch, gates: Tensor = gates,
        ) -> Callable[[], object]:  # fmt: skip
            return lambda: backend.attend(q, gates, spec, kv, batch)

        def stored(
            backend: CpuAttention | ReferenceAttention, spec: AttentionSpec = spec, kv: KVLayer = kv,
            qkv: Tensor = qkv, batch: ForwardBatch = batch,
        ) -> Callable[[], object]:  # fmt: skip
            return lambda: backend.store(qkv, spec, kv, batch)

        yield f"store, {heads} heads", stored(native), stored(reference)
        yield f"attend, {kind}", call(native), call(reference)


def measure(kernels: Kernels, rows_list: list[int], seconds: float, clock: Callable[[], float]) -> Iterator[Timing]:
    """All kernels at each number of tokens; attention of decode rows at 544 keys, then one chunk of 1,536 tokens."""
    for rows in rows_list:
        groups = [linear_calls(kernels, rows), expert_calls(kernels, rows), op_calls(kernels, rows)]
        if rows <= 64:
            groups.append(attention_calls(kernels, rows, 544))
        for calls in groups:
            for name, native, reference in calls:
                yield Timing(name, rows, *time_call(native, seconds, clock), *time_call(reference, seconds, clock))
    for name, native, reference in attention_calls(kernels, 1, 1536, 1536):
        yield Timing(
            f"{name}, whole prompt", 1536, *time_call(native, seconds, clock), *time_call(reference, seconds, clock)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time: for a busy machine")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--seconds", type=float, default=0.4, help="spent on each measurement")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory of compiled kernels")
    parser.add_argument("--json", type=Path, help="also write the timings here")
    options = parser.parse_args()
    threads, clock = (1, time.thread_time) if options.cpu_time else (options.threads, time.perf_counter)
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    kernels = load_kernels(options.cache, threads)
    print(f"{kernels.vectors}; {kernels.threading}; torch {torch.__version__}; bfloat16; microseconds best / median\n")
    print(f"| {'kernel':<53} | {'rows':>5} | {'native':>17} | {'torch':>19} | ratio |")
    print(f"|{'-' * 55}|------:|{'-' * 18}:|{'-' * 20}:|------:|")
    timings: list[Timing] = []
    with torch.inference_mode():
        for timing in measure(kernels, options.rows, options.seconds, clock):
            timings.append(timing)
            ours = f"{timing.native_best:.1f} / {timing.native_median:.1f}"
            theirs = f"{timing.torch_best:.1f} / {timing.torch_median:.1f}"
            ratio = timing.torch_median / timing.native_median
            print(f"| {timing.kernel:<53} | {timing.rows:>5} | {ours:>17} | {theirs:>19} | {ratio:>5.1f} |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(timing) for timing in timings], indent=1))


if __name__ == "__main__":
    main()
