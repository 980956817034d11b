"""Time the engine alone: forward passes of one worker in this process, no HTTP, no scheduler, no other process.

    python -m benchmarks.step --model-path DIR --dtype bfloat16 --batch 1,4,16 --prompt-tokens 128 --steps 64

Each batch size prefills B requests of random tokens in chunks, then decodes `--steps` tokens; the figure is the
median time of a decode step. `--prefill` times prompts of those lengths alone, from first chunk to first token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.report import append, context, spread, table
from srt.configs.device import read_device
from srt.configs.models import checkpoint_directory, read_facts
from srt.configs.plan import RuntimePlan
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig
from srt.messages import PageUpdate, RowStart, SamplingSpec, StepPlan
from srt.worker.startup import Engine as Worker
from srt.worker.startup import start


class Engine:
    """One worker's runner and the little bookkeeping that hands it rows and pages."""

    def __init__(self, plan: RuntimePlan, runner: Worker, seed: int) -> None:
        self.plan, self.runner = plan, runner
        self._rng = np.random.default_rng(seed)
        self._step = 0

    def prefill(self, rows: int, tokens: int) -> float:
        """Compute prompts of `tokens` random ids on rows 0 to `rows` - 1, room for answers included. Seconds."""
        pages = -(-(tokens + self.room) // self.plan.page_size)
        starts = [RowStart(row, self._prompt(tokens), 0, tokens, SamplingSpec(temperature=0.0)) for row in range(rows)]
        updates = [
            PageUpdate(group, list(range(rows)), [0] * rows, [pages] * rows, list(range(1, rows * pages + 1)))
            for group in range(len(self.plan.groups))
        ]
        begun = time.perf_counter()
        for row in range(rows):
            done = 0
            while done < tokens:
                count = min(self.plan.chunked_prefill_size, tokens - done)
                done += count
                self._run([row], [count], [done == tokens], starts, updates)
                starts, updates = [], []
        return time.perf_counter() - begun

    def decode(self, rows: int, steps: int) -> list[float]:
        """Seconds of each of `steps` steps in which every row gains a token."""
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            self._run(list(range(rows)), [1] * rows, [True] * rows, [], [])
            times.append(time.perf_counter() - begun)
        return times

    room = 0
    """Tokens that follow a prompt; pages for them are handed out with the prompt's."""

    def _prompt(self, tokens: int) -> bytes:
        return self._rng.integers(16, self.plan.model.vocab_size - 32, tokens).astype("<i4").tobytes()

    def _run(
        self, rows: list[int], counts: list[int], emits: list[bool], starts: list[RowStart], pages: list[PageUpdate]
    ) -> None:
        self._step += 1
        self.runner.step(StepPlan(self._step, rows, counts, emits, starts, pages))


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Decode figures by batch size and first-token times by prompt length, in milliseconds."""
    decode, first = {}, {}
    with tqdm(total=len(args.batch) + len(args.prefill), disable=args.quiet) as bar:
        for rows in args.batch:
            engine.room = args.steps + 8
            engine.prefill(rows, args.prompt_tokens)
            engine.decode(rows, 8)
            decode[rows] = spread(engine.decode(rows, args.steps), 1e3)
            bar.update()
        for tokens in args.prefill:
            engine.room = 1
            first[tokens] = spread([engine.prefill(1, tokens) for _ in range(args.repeats + 1)][1:], 1e3)
            bar.update()
    return {"decode_step_ms": decode, "first_token_ms": first}


def numbers(text: str) -> list[int]:
    """ "1,4,16" -> [1, 4, 16]; empty -> []."""
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="checkpoint directory")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (default %(default)s)")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    parser.add_argument("--batch", type=numbers, default=[1, 4, 16], help="batch sizes to decode (default 1,4,16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt before decoding (default %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps (default %(default)s)")
    parser.add_argument("--prefill", type=numbers, default=[512, 1536], help="prompt lengths to time alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each length (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="prompts follow from it (default %(default)s)")
    parser.add_argument("--out", type=Path, help="append the result to this file of JSON lines")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    server = ServerConfig(
        model_path=args.model_path, dtype=args.dtype, load_format=args.load_format,
        max_running_requests=max(args.batch, default=1),
    )  # fmt: skip
    plan = resolve(server, read_facts(checkpoint_directory(args.model_path)), read_device("cpu"))
    with tempfile.TemporaryDirectory() as rundir:
        started = start(plan, Path(rundir), 0, lambda done, total: None)
    result = measure(Engine(plan, started.runner, args.seed), args)
    rows = [("dtype, threads", f"{plan.dtype}, {plan.worker_threads}")]
    rows += list(started.facts.items())
    for batch, figures in result["decode_step_ms"].items():
        rate = batch / figures["p50"] * 1e3
        rows.append(
            (
                f"decode, batch {batch}",
                f"{figures['p50']:.2f} ms a step (p99 {figures['p99']:.2f}), {rate:.0f} tokens/s",
            )
        )
    for tokens, figures in result["first_token_ms"].items():
        rows.append((f"prefill of {tokens}", f"{figures['p50']:.1f} ms to the first token"))
    print(table(rows))
    if args.out:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        append(args.out, {"benchmark": "step", **context(), "options": options, **result})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
