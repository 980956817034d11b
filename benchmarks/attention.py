"""Time attention on a GPU, KV write included, beside the least time that its bytes or products need.

    python -m benchmarks.attention --out results.jsonl          # every case that the time allows, default page size
    python -m benchmarks.attention --only prompt --kv bf16 --backends triton,flashinfer
    python -m benchmarks.attention --tune --only prompt --kv bf16      # ways to cut prompts
    python -m benchmarks.attention --tune --only decode --kv bf16      # ways to share out the keys of decodes

Shapes are Step-3.7's: 64 query heads with full attention, 96 with a window of 512, 8 key heads of 128. Decodes are
medians of replays of a CUDA graph whose calls follow one another over different KV memory; prompts are medians between
events. Inputs are random. Before anything is timed, each backend is compared with the reference on a small batch.
What the time does not allow is named, not timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu import integers, seconds, versions
from benchmarks.report import append, context
from srt.layers.attention.contract import AttentionBackend, AttentionSpec
from srt.layers.attention.flashinfer import FlashInfer, FlashInferAttention, Shape, refusal
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cuda.attention import Sharing, Tiling, TritonAttention
from srt.layers.gpu import current_gpu

KV_HEADS, SIZE, ROTARY, WINDOW = 8, 128, 64, 512
Q_HEADS: Final = {"full": 64, "window": 96}
DTYPES: Final = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
TOLERANCE: Final = {"bf16": 1e-2, "fp8": 1e-2}
DECODES: Final = tuple((rows, done) for done in (128, 2048, 7920) for rows in (1, 8, 64, 256))
PROMPTS: Final = ((4, 2048), (1, 8000))
LAYERS_BYTES: Final = 256 << 20
"""KV memory that calls of a graph go through before they come back to the first: several times a GPU's cache."""
MOST_LAYERS, FEWEST_CALLS = 16, 4
REPEATS: Final = 7
Way = Tiling | Sharing


@dataclass(frozen=True)
class Case:
    """`rows` rows that have `done` keys each and compute `count` more."""

    kind: str
    rows: int
    done: int
    count: int
    page: int
    kv: str

    @property
    def prompt(self) -> bool:
        return self.count > 1

    @property
    def text(self) -> str:
        work = f"{self.rows} x {self.count}" if self.prompt else f"{self.rows} at {self.done}"
        return f"{'prompt' if self.prompt else 'decode'} {work:<10} {self.kind:<6} page {self.page:<2} {self.kv}"

    @property
    def window(self) -> int | None:
        return WINDOW if self.kind == "window" else None

    @property
    def flops(self) -> float:
        """Products of visible keys alone."""
        ends = torch.arange(self.done + 1, self.done + self.count + 1)
        seen = int(ends.clamp(max=self.window or int(ends[-1])).sum())
        return 4.0 * self.rows * seen * Q_HEADS[self.kind] * SIZE

    @property
    def moved(self) -> float:
        """Bytes: keys and values that are seen, read once; q, k and v read, q written and read, k and v written."""
        keys = self.done + self.count
        seen = keys if self.window is None else min(keys, self.window + self.count - 1)
        item, tokens, heads = DTYPES[self.kv].itemsize, self.rows * self.count, Q_HEADS[self.kind]
        return float(SIZE * (self.rows * 2 * seen * KV_HEADS * item + tokens * (2 * (3 * heads) + 4 * KV_HEADS)))


@dataclass
class Inputs:
    """What a case is computed from; several layers' KV memory."""

    case: Case
    batch: ForwardBatch
    spec: AttentionSpec
    projected: Tensor
    layers: list[KVLayer]
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.q = torch.randn(self.projected.shape[0], self.spec.q_heads, SIZE, device="cuda").bfloat16()

    @property
    def width(self) -> int:
        return (self.spec.q_heads + 2 * KV_HEADS) * SIZE

    def both(self, backend: AttentionBackend, layer: int) -> Tensor:
        """Store and attend, as a model's layer does."""
        kv = self.layers[layer % len(self.layers)]
        q = backend.store(self.projected[:, : self.width], self.spec, kv, self.batch)
        return backend.attend(q, self.projected[:, self.width :], self.spec, kv, self.batch)

    def attend(self, backend: AttentionBackend, layer: int) -> Tensor:
        """Attend alone."""
        kv = self.layers[layer % len(self.layers)]
        return backend.attend(self.q, self.projected[:, self.width :], self.spec, kv, self.batch)


def inputs_of(case: Case, layers: int | None = None) -> Inputs:
    """Random inputs; pages lie in random order."""
    keys, dtype = case.done + case.count, DTYPES[case.kv]
    row_pages = -(-keys // case.page)
    pages = case.rows * row_pages + 1
    layer_bytes = 2 * pages * case.page * KV_HEADS * SIZE * dtype.itemsize
    wanted = layers or min(MOST_LAYERS, -(-LAYERS_BYTES // layer_bytes))
    shape = pages, case.page, KV_HEADS, SIZE

    def memory() -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype)

    table = (torch.randperm(pages - 1, device="cuda") + 1).int().view(case.rows, row_pages)
    positions = torch.arange(case.done, keys, device="cuda")
    slots = table[:, positions // case.page].long() * case.page + positions % case.page
    starts = list(range(0, case.rows * case.count + 1, case.count))
    batch = ForwardBatch(
        input_ids=torch.zeros(starts[-1], dtype=torch.int64, device="cuda"), positions=positions.repeat(case.rows),
        query_starts=torch.tensor(starts, dtype=torch.int32, device="cuda"), query_starts_list=starts,
        kv_lens=torch.full((case.rows,), keys, dtype=torch.int32, device="cuda"), kv_lens_list=[keys] * case.rows,
        page_tables=(table,), slots=(slots.flatten(),), logit_tokens=torch.zeros(0, dtype=torch.int64, device="cuda"),
        page_size=case.page,
    )  # fmt: skip
    heads = Q_HEADS[case.kind]
    projected = torch.randn(starts[-1], (heads + 2 * KV_HEADS) * SIZE + heads, device="cuda").bfloat16()
    return Inputs(case, batch, spec_of(case, keys), projected, [KVLayer(memory(), memory()) for _ in range(wanted)])


def spec_of(case: Case, positions: int) -> AttentionSpec:
    """A layer of this kind; scales of KV codes that are not one."""
    angles = torch.arange(positions + 1.0, device="cuda")[:, None] * 0.9 ** torch.arange(ROTARY // 2, device="cuda")
    scales = (torch.tensor(scale if case.kv == "fp8" else 1.0, device="cuda") for scale in (0.05, 0.06))
    norms = (torch.randn(SIZE, device="cuda").bfloat16() * 0.1 for _ in range(2))
    k_scale, v_scale = scales
    q_norm, k_norm = norms
    return AttentionSpec(
        layer=0, group=0, q_heads=Q_HEADS[case.kind], kv_heads=KV_HEADS, head_dim=SIZE, rotary_dim=ROTARY,
        window=case.window, scale=SIZE**-0.5, q_norm=q_norm, k_norm=k_norm,
        rope=torch.cat([angles.cos(), angles.sin()], dim=-1), eps=1e-5, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def error(backend: AttentionBackend, case: Case) -> float:
    """Relative error by norm of what is attended after storing, against the reference in float32 on the same KV."""
    inputs = inputs_of(case, layers=1)
    backend.begin(inputs.batch)
    found = inputs.both(backend, 0).float()
    q = ReferenceAttention().store(inputs.projected[:, : inputs.width], inputs.spec, inputs.layers[0], inputs.batch)
    gates = inputs.projected[:, inputs.width :].float()
    expected = ReferenceAttention().attend(q.float(), gates, inputs.spec, inputs.layers[0], inputs.batch)
    return float((found - expected).norm() / expected.norm())


def check(backend: AttentionBackend, cases: list[Case]) -> float:
    """The largest error over small forms of these cases. Ends the run if one is out of tolerance."""
    worst = 0.0
    for case in sorted({small(case) for case in cases}, key=lambda one: one.text):
        found = error(backend, case)
        if not found < TOLERANCE[case.kv]:
            raise SystemExit(f"{case.text}: relative error {found:.2e}, tolerated are {TOLERANCE[case.kv]:.0e}")
        worst = max(worst, found)
    return worst


def between_events(call: Callable[[int], Any]) -> float:
    """Median seconds of a call, one after the other."""
    call(0)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    for number, mark in enumerate(marks):
        mark.record()
        if number < REPEATS:
            call(number)
    torch.cuda.synchronize()
    times = [float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]
    return statistics.median(times) / 1e3


def seconds_of(inputs: Inputs, call: Callable[[int], Any]) -> float:
    """Seconds of a call: prompts one after the other, decodes out of a graph."""
    if inputs.case.prompt:
        return between_events(call)
    return seconds(call, max(FEWEST_CALLS, len(inputs.layers)), REPEATS)


def measure(name: str, backend: AttentionBackend, inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the result."""
    case = inputs.case
    backend.begin(inputs.batch)
    both, attend = (seconds_of(inputs, functools.partial(call, backend)) for call in (inputs.both, inputs.attend))
    floor = max(case.moved / (args.bandwidth * 1e12), case.flops / (args.matrix_rate * 1e12))
    return {
        "backend": name, "case": case.text, **asdict(case), "ms": round(both * 1e3, 4),
        "attend_ms": round(attend * 1e3, 4), "tflop_per_s": round(case.flops / attend / 1e12, 1),
        "gb_per_s": round(case.moved / both / 1e9), "floor_ms": round(floor * 1e3, 4),
        "floor_percent": round(100 * floor / both, 1),
    }  # fmt: skip


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All cases that were asked for, prompts first, the ends of what decodes may be before what lies between."""
    decodes = sorted(DECODES, key=lambda one: (one[1] == 2048, one))
    shapes = [(rows, 0, count) for rows, count in PROMPTS if args.only != "decode"]
    shapes += [(rows, done, 1) for rows, done in decodes if args.only != "prompt"]
    return [
        Case(kind, rows, done, count, page, kv)
        for page in args.pages
        for kv in args.kv.split(",")
        for rows, done, count in shapes
        for kind in Q_HEADS
    ]


def backend_of(name: str, kv: str, wait_s: float) -> AttentionBackend | str:
    """A backend ready to attend, or why it is not there."""
    gpu = current_gpu()
    if name == "triton" or gpu is None:
        return TritonAttention(gpu)
    if name != "flashinfer":
        raise SystemExit(f"--backends {name}: there are triton and flashinfer")
    shape = Shape(torch.bfloat16, DTYPES[kv], frozenset({SIZE}), frozenset({False, True}))
    refused = refusal(shape, gpu)
    if refused is not None:
        return refused
    begun, library = time.perf_counter(), FlashInfer(gpu, shape)
    library.thread.join(wait_s)
    print(f"flashinfer: {library.failed or 'ready'} after {time.perf_counter() - begun:.1f} s", flush=True)
    if not library.ready:
        return library.failed or f"not compiled within {wait_s:.0f} s; what is compiled is kept for the next time"
    return FlashInferAttention(gpu, library)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each backend over all cases, while there is time."""
    results, skipped = [], list[str]()
    for name, kv in itertools.product(args.backends.split(","), args.kv.split(",")):
        backend = backend_of(name, kv, args.wait_s)
        if isinstance(backend, str):
            print(f"{name}, {kv}: not timed: {backend}", flush=True)
            continue
        begun = time.perf_counter()
        for page in args.pages:
            cases = [case for case in cases_of(args) if (case.page, case.kv) == (page, kv)]
            if name == "flashinfer":
                cases = [case for case in cases if case.prompt]  # it gives all others to Triton
            if not cases:
                continue
            worst = check(backend, cases)
            print(f"{name}, page {page}, {kv}: relative error {worst:.1e}", flush=True)
            for case in cases:
                if time.perf_counter() - begun > args.budget_s:
                    skipped.append(f"{name} {case.text}")
                else:
                    results.append(measure(name, backend, inputs_of(case), args) | {"error": worst})
    print(f"{'':<45}{'ms':>9}{'attend':>9}{'floor':>9}{'%':>7}{'TFLOP/s':>9}{'GB/s':>7}")
    for line in results:
        name = f"{line['backend']} {line['case']}"
        shown = "{ms:>9.4f}{attend_ms:>9.4f}{floor_ms:>9.4f}{floor_percent:>7.1f}{tflop_per_s:>9.1f}{gb_per_s:>7}"
        print(f"{name:<45}" + shown.format(**line))
    if skipped:
        print(f"not timed, {args.budget_s:.0f} s were over: {len(skipped)} cases from {skipped[0]!r} on")
    return results


BEFORE: Final = Tiling(stages=2, masks="all", ahead=False, longest_first=False)
"""What prompts were cut like before there was a choice."""


def tilings() -> list[Tiling]:
    """Ways to cut prompts that are worth a try: others spill registers or do not fit into shared memory."""
    usual = Tiling()
    found = [BEFORE, replace(BEFORE, stages=3), replace(BEFORE, stages=5), replace(BEFORE, stages=3, ahead=True)]
    found += [replace(usual, masks=masks) for masks in ("all", "branch", "split")]
    found += [replace(usual, longest_first=False), replace(usual, by_page=True), replace(usual, stages=4)]
    shapes = [(128, 128, 8), (64, 64, 4), (64, 32, 4), (128, 32, 8), (128, 32, 4), (256, 64, 16), (256, 32, 8)]
    for lines, keys, warps in shapes:
        for masks in ("branch", "split"):
            found.append(replace(usual, lines=lines, keys=keys, warps=warps, masks=masks))
    found += [replace(usual, lines=64, keys=64, warps=4, stages=stages) for stages in (2, 4)]
    return list(dict.fromkeys(found))


def sharings() -> list[Sharing]:
    """Ways to share out the keys of decodes that are worth a try, the usual one first."""
    found = [Sharing(programs=programs) for programs in (512, 1024, 2048)]
    for keys, warps, stages in [(64, 4, 2), (64, 4, 3), (32, 4, 3), (32, 4, 4), (128, 4, 2), (128, 8, 2)]:
        for programs in (512, 1024, 2048):
            found.append(Sharing(programs, keys, warps, stages, ahead=True))
    return found


def ways_of(case: Case) -> list[Way]:
    """What is tried for a case; the first is what there was before."""
    return [*tilings()] if case.prompt else [*sharings()]


def backend_with(way: Way) -> TritonAttention:
    """Triton's attention that does it this way."""
    if isinstance(way, Tiling):
        return TritonAttention(current_gpu(), tiling=way)
    return TritonAttention(current_gpu(), sharing=way)


def tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way over every case; the best ones and the one before of each case are printed."""
    begun, results, cases = time.perf_counter(), [], cases_of(args)
    kinds = sorted({small(case) for case in cases}, key=lambda one: one.text)
    ways = [(kind, way) for kind in kinds for way in ways_of(kind)]
    with ThreadPoolExecutor(args.jobs) as pool:
        faults = dict(zip(ways, pool.map(lambda pair: fault_of(*pair), ways), strict=True))
    print(f"{len(ways)} ways compiled and checked in {time.perf_counter() - begun:.1f} s", flush=True)
    for case in cases:
        inputs, lines = inputs_of(case, layers=1 if case.prompt else None), []
        for way in ways_of(case):
            line = {"case": case.text, **asdict(case), "way": asdict(way)}
            fault = faults[small(case), way]
            lines.append(line | ({"fault": fault} if fault else tried(inputs, way)))
        ranked = sorted((line for line in lines if "ms" in line), key=lambda line: line["ms"])
        print(case.text, flush=True)
        for line in [*ranked[: args.best], lines[0]]:
            rates = "{tflop_per_s:>6} TFLOP/s {gb_per_s:>5} GB/s".format_map(
                {"tflop_per_s": "-", "gb_per_s": "-"} | line
            )
            print(f"  {line.get('ms', '-'):>8} ms {rates}  {words(line['way'])}")
        results += lines
    for (case, way), fault in faults.items():
        if fault:
            print(f"{case.text}: {fault}: {words(asdict(way))}")
    return results


def words(way: dict[str, Any]) -> str:
    """ "lines 128, keys 64, warps 8, stages 3, masks branch, ahead, longest_first"."""
    named = [f"{name} {value}" for name, value in way.items() if not isinstance(value, bool)]
    return ", ".join([*named, *(name for name, value in way.items() if value is True)])


def small(case: Case) -> Case:
    """A case that needs the same kernels and that the reference can compute."""
    return replace(case, rows=3, done=600, count=70) if case.prompt else replace(case, done=600)


def fault_of(case: Case, way: Way) -> str:
    """Compile one way; what was wrong if it does not run or is wrong."""
    try:
        found = error(backend_with(way), case)
    except Exception as fault:  # what a compiler or a launch may raise has no common type
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:80]}"
    return "" if found < TOLERANCE[case.kv] else f"relative error {found:.1e}"


def tried(inputs: Inputs, way: Way) -> dict[str, float]:
    """Time to attend alone, this way."""
    backend, case = backend_with(way), inputs.case
    backend.begin(inputs.batch)
    took = seconds_of(inputs, lambda number: inputs.attend(backend, number))
    rates = {"tflop_per_s": round(case.flops / took / 1e12, 1), "gb_per_s": round(case.moved / took / 1e9)}
    return {"ms": round(took * 1e3, 4), **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="triton", help="of triton, flashinfer (default %(default)s)")
    parser.add_argument("--only", choices=("prompt", "decode"), help="prompts or decodes alone")
    parser.add_argument("--pages", type=integers, default=[16], help="page sizes (default 16)")
    parser.add_argument("--kv", default="bf16,fp8", help="of bf16, fp8 (default %(default)s)")
    parser.add_argument(
        "--budget-s", type=float, default=12.0, help="begin no case of a backend after it (default %(default)s)"
    )
    parser.add_argument("--wait-s", type=float, default=240.0, help="for FlashInfer's kernels (default %(default)s)")
    parser.add_argument("--tune", action="store_true", help="try ways to cut prompts and to share out keys")
    parser.add_argument("--best", type=int, default=3, help="ways that --tune prints for a case (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=16, help="compilations at once (default %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of the floor")
    parser.add_argument("--matrix-rate", type=float, default=790.0, help="TFLOP/s of the floor")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    args = parser.parse_args()
    if current_gpu() is None:
        raise SystemExit("benchmarks.attention needs a GPU")
    torch.manual_seed(1)
    with torch.inference_mode():
        results = tune(args) if args.tune else compare(args)
    if args.out is not None:
        append(args.out, {"benchmark": "attention", **context(), **versions(), "results": results})


if __name__ == "__main__":
    main()
