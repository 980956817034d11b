"""Time the engine alone: forward passes of one worker in this process, no HTTP, no scheduler, no other process.

    python -m benchmarks.step --model-path DIR --dtype bfloat16 --batch 1,4,16 --prompt-tokens 128 --steps 64

Each batch size prefills B requests of random tokens in chunks, then decodes `--steps` tokens; the figure is the
mean time of a decode step. `--prefill` times prompts of those lengths alone, from first chunk to first token, and tells
the median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.gpu import integers, versions
from benchmarks.presets import FORMATS, PRESETS, write_preset
from benchmarks.report import append, context, spread, table
from srt.configs.device import read_device
from srt.configs.models import checkpoint_directory, read_facts
from srt.configs.plan import RuntimePlan
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig
from srt.layers.attention.contract import COMPILING
from srt.layers.gpu import current_gpu
from srt.messages import PageUpdate, RowStart, SamplingSpec, StepPlan
from srt.worker.device.runner import DeviceRunner
from srt.worker.startup import DTYPES, Pick, Started, pick_backends, start
from srt.worker.startup import Engine as Worker


class Engine:
    """One worker's runner and the little bookkeeping that hands it rows and pages."""

    def __init__(self, plan: RuntimePlan, runner: Worker, seed: int) -> None:
        self.plan, self.runner = plan, runner
        self._rng = np.random.default_rng(seed)
        self._step = 0
        self._under_way = 0
        self.tokens = 0

    def prefill(self, rows: int, tokens: int, *, together: bool = False) -> float:
        """Compute prompts of `tokens` random ids on rows 0 to `rows` - 1, room for answers included. Seconds."""
        pages = -(-(tokens + self.room) // self.plan.page_size)
        starts = [RowStart(row, self._prompt(tokens), 0, tokens, self.sampling) for row in range(rows)]
        updates = [
            PageUpdate(group, list(range(rows)), [0] * rows, [pages] * rows, list(range(1, rows * pages + 1)))
            for group in range(len(self.plan.groups))
        ]
        chunk = self.plan.chunked_prefill_size
        width = max(1, chunk // tokens) if together else 1
        begun = time.perf_counter()
        for row in range(0, rows, width):
            group, done = list(range(row, min(rows, row + width))), 0
            while done < tokens:
                count = min(chunk, tokens - done)
                done += count
                self._run(group, [count] * len(group), [done == tokens] * len(group), starts, updates)
                starts, updates = [], []
        self._wait(0)
        return time.perf_counter() - begun

    def decode(self, rows: int, steps: int) -> list[float]:
        """Seconds of each of `steps` steps in which every row gains a token, as many in flight as a server has."""
        times, begun = [], time.perf_counter()
        for step in range(steps):
            drafts = [self.plan.drafting.drafts] * rows if self.plan.drafting.drafts else []
            self._run(list(range(rows)), [1] * rows, [True] * rows, [], [], drafts)
            if step == steps - 1:
                self._wait(0)
            now = time.perf_counter()
            times.append(now - begun)
            begun = now
        return times

    sampling = SamplingSpec(temperature=0.0)
    """Of all rows."""
    room = 0
    """Tokens that follow a prompt; pages for them are handed out with the prompt's."""

    def _prompt(self, tokens: int) -> bytes:
        return self._rng.integers(16, self.plan.model.vocab_size - 32, tokens).astype("<i4").tobytes()

    def _run(
        self, rows: list[int], counts: list[int], emits: list[bool], starts: list[RowStart], pages: list[PageUpdate],
        drafts: list[int] | None = None,
    ) -> None:  # fmt: skip
        self._step += 1
        self.runner.submit(StepPlan(self._step, rows, counts, emits, starts, pages, drafts=drafts or []))
        self._under_way += 1
        self._wait(self.plan.steps_in_flight - 1)

    def _wait(self, left: int) -> None:
        """Pick up results until no more than `left` are to come."""
        while self._under_way > left:
            for result in self.runner.finished():
                self._under_way -= 1
                self.tokens += len(result.token_ids)


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Decode figures by batch size and first-token times by prompt length, in milliseconds."""
    decode, first = {}, {}
    with tqdm(total=len(args.batch) + len(args.prefill), disable=args.quiet) as bar:
        for rows in args.batch:
            engine.room = (args.steps + 8) * (1 + engine.plan.drafting.drafts)
            engine.prefill(rows, args.prompt_tokens, together=True)
            engine.decode(rows, 8)
            tokens = engine.tokens
            times = engine.decode(rows, args.steps)
            decode[rows] = spread(times, 1e3)
            decode[rows]["tokens"] = (engine.tokens - tokens) / rows / args.steps
            bar.update()
        for rows, tokens in args.prefill:
            engine.room = 1
            times = [engine.prefill(rows, tokens, together=True) for _ in range(args.repeats + 1)][1:]
            first[f"{rows}x{tokens}"] = spread(times, 1e3)
            bar.update()
    return {"decode_step_ms": decode, "first_token_ms": first}


def prompts(text: str) -> list[tuple[int, int]]:
    """ "512,4x2048" -> [(1, 512), (4, 2048)]: prompts of a step, and tokens of each."""
    sizes = [part.rpartition("x") for part in text.split(",") if part]
    return [(int(rows or 1), int(tokens)) for rows, _, tokens in sizes]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-path", help="checkpoint directory")
    model.add_argument("--preset", choices=PRESETS, help="made-up weights of this size, experts evenly chosen")
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of a preset's routed experts")
    parser.add_argument("--mtp", action="store_true", help="guess ahead, with a preset's draft modules too")
    parser.add_argument("--accept-length", type=float, help="with --mtp on a GPU: tokens a step, drawn to this mean")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default %(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share the model (default %(default)s)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (default %(default)s)")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    parser.add_argument("--batch", type=integers, default=[1, 4, 16], help="batch sizes to decode (default 1,4,16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt before decoding (default %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps (default %(default)s)")
    parser.add_argument("--prefill", type=prompts, default=[(1, 512), (1, 1536)], help="prompts to time alone: 4x2048")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each length (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="prompts follow from it (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of all rows (default: the largest logit)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of all rows (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="of all rows (default: all)")
    parser.add_argument("--context-length", type=int, help="longest request (default: the checkpoint's)")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="planned and measured bytes of each part (--batch '': of a whole server)",
    )
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--attention-backend", default="auto", help="as of a server (default %(default)s)")
    parser.add_argument("--profile", type=Path, help="write time by kernel of decode steps and prefills here")
    parser.add_argument("--out", type=Path, help="append the result to this file of JSON lines")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def bring_up(args: argparse.Namespace, directory: Path, rank: int = 0) -> tuple[RuntimePlan, Started, float]:
    """Plan and start one rank; seconds that it took."""
    begun = time.perf_counter()
    path = args.model_path or str(directory / "model")
    most = max([*args.batch, *(rows for rows, _ in args.prefill)], default=1)
    rows = None if args.memory and not args.batch else most
    server = ServerConfig(
        model_path=path, dtype=args.dtype, load_format="dummy" if args.preset else args.load_format,
        max_running_requests=rows, context_length=args.context_length, device=args.device,
        speculative_algorithm="mtp" if args.mtp else "off", random_seed=args.seed,
        attention_backend=args.attention_backend, tp_size=args.tp_size,
    )  # fmt: skip
    device = read_device(args.device, args.tp_size)
    facts = read_facts(checkpoint_directory(path), announced=bool(args.preset))
    plan = resolve(server, facts, device)
    picks = None
    if device.device == "cuda":
        picks = pick_backends("cuda", DTYPES[plan.dtype], plan.worker_threads)
        if args.preset:
            picks = replace(picks, ops=Pick("benchmarks.uniform:UniformOps", "experts evenly chosen", (current_gpu(),)))
        if args.accept_length:
            picks = replace(picks, rows=Pick("benchmarks.uniform:AcceptingRows", "drawn", (args.accept_length,)))
        if args.eager:
            picks = replace(picks, engine=Pick("device", "--eager"))
    started = start(plan, directory, rank, lambda done, total: None, picks)
    return plan, started, time.perf_counter() - begun


def memory(plan: RuntimePlan, started: Started) -> list[tuple[str, str]]:
    """Planned and measured bytes of each part; steps are recorded by now."""
    measured = dict(started.memory)
    if isinstance(started.runner, DeviceRunner) and started.runner.graphs is not None:
        measured["graphs"] = started.runner.graphs.bytes
    rows = []
    for part, planned in plan.memory.items():
        found = measured.get(part)
        off = "not measured" if found is None else f"measured {found / 2**20:10.1f} MiB, {found / planned - 1:+7.2%}"
        rows.append((part, f"planned {planned / 2**20:10.1f} MiB, {off}"))
    rows.append(
        ("sum", f"planned {sum(plan.memory.values()) / 2**20:10.1f} MiB of {plan.device.memory_bytes / 2**20:.1f}")
    )
    if plan.device.device == "cuda":
        free, whole = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        rows.append(("left", f"{free / 2**20:.1f} MiB of {whole / 2**20:.1f}; torch holds {reserved / 2**20:.1f}"))
    return rows


def main() -> int:
    """Command line entry."""
    args = parse()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if args.preset:
            write_preset(directory / "model", args.preset, args.format, mtp=args.mtp)
        others = [spawn.Process(target=run, args=(args, directory, rank)) for rank in range(1, args.tp_size)]
        for other in others:
            other.start()
        run(args, directory, 0)
        for other in others:
            other.join()
    return 0


def run(args: argparse.Namespace, directory: Path, rank: int) -> None:
    """Measure as one of the ranks, all of which do the same; the first one tells."""
    plan, started, took_s = bring_up(args, directory, rank)
    recording = time.perf_counter()
    if isinstance(started.runner, DeviceRunner) and started.runner.graphs is not None and args.batch:
        started.runner.graphs.keep(args.batch, draws=args.temperature > 0)
    while started.runner.unprepared:
        started.runner.prepare()
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    rows = [("dtype, threads", f"{plan.dtype}, {plan.worker_threads}"), ("start", f"{took_s:.1f} s")]
    rows.append(("recording", f"{time.perf_counter() - recording:.1f} s"))
    rows += list(started.facts.items())
    if args.memory:
        rows += memory(plan, started)
    engine = Engine(plan, started.runner, args.seed)
    engine.sampling = SamplingSpec(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    result = measure(engine, args)
    kernels = by_kernel(engine, args) if args.profile else ""
    if rank == 0:
        print(table(rows + figures_of(result)), flush=True)
        if args.profile:
            args.profile.write_text(kernels, encoding="utf-8")
        if args.out:
            options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
            facts = {"start_s": round(took_s, 2), "facts": started.facts, "versions": versions()}
            append(args.out, {"benchmark": "step", **context(), "options": options, **facts, **result})


def figures_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines for people."""
    rows = []
    for batch, figures in result["decode_step_ms"].items():
        rate = batch * figures["tokens"] / figures["mean"] * 1e3
        took = f"{figures['mean']:.3f} ms a step (p50 {figures['p50']:.3f}, p99 {figures['p99']:.3f})"
        rows.append((f"decode, batch {batch}", f"{took}, {rate:.0f} tokens/s"))
    for name, figures in result["first_token_ms"].items():
        rows.append((f"prefill of {name}", f"{figures['p50']:.1f} ms to the first token"))
    return rows


def by_kernel(engine: Engine, args: argparse.Namespace) -> str:
    """What each kernel adds to a decode step of each batch, over eight of them, and to each prefill."""
    found = []
    for rows in args.batch:
        engine.room = 64
        engine.prefill(rows, args.prompt_tokens, together=True)
        engine.decode(rows, 4)
        with profile(activities=[ProfilerActivity.CUDA]) as recording:
            engine.decode(rows, 8)
        found += [f"=== batch {rows}", *charges(recording, 8)]
    for rows, tokens in args.prefill:
        engine.room = 1
        with profile(activities=[ProfilerActivity.CUDA]) as recording:
            engine.prefill(rows, tokens, together=True)
        found += [f"=== prefill of {rows}x{tokens}", *charges(recording, 1)]
    return "\n".join(found)


def charges(recording: profile, steps: int) -> list[str]:
    """Microseconds that each kernel adds to one of `steps` recorded steps, in lines for people.

    Kernels overlap: one begins while another still runs, or on a stream beside it. So a kernel is charged with the time
    by which it ends after all that ended before it; these add up to the step.
    """
    added, counts, last = Counter[str](), Counter[str](), None
    for event in sorted(recording.events() or [], key=lambda event: event.time_range.end):
        if event.device_type == DeviceType.CUDA:
            begin = event.time_range.start if last is None else last
            last = max(begin, event.time_range.end)
            added[event.name] += last - begin
            counts[event.name] += 1
    lines = [
        f"{took / steps:9.1f} us  {counts[name] / steps:6.1f} x  {name[:110]}" for name, took in added.most_common(32)
    ]
    return [*lines, f"{added.total() / steps:9.1f} us in all"]


if __name__ == "__main__":
    raise SystemExit(main())
