"""Load a running server over HTTP and report throughput and latency.

    python -m benchmarks.serve --url http://127.0.0.1:30000 --workload short --concurrency 16
    python -m benchmarks.serve --workload shared-prefix --rate 10 --requests 200 --out results.jsonl

Closed loop (`--concurrency C`): C clients, each sends its next request when its last one has ended.
Open loop (`--rate R`): sessions arrive at R per second (Poisson, seeded), however busy the server is.
Requests stream, greedy, of fixed length (`ignore_eos`). Measured at this client, per request: time to first token
(request written to first chunk with output), gaps between chunks, time per output token after the first, end to end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.report import append, context, spread, table
from benchmarks.workloads import WORKLOADS, Ids, Workload, sessions


@dataclass
class Record:
    """One request as this client saw it; times in seconds."""

    sent: float
    stamps: list[float] = field(default_factory=list)
    ended: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    session: aiohttp.ClientSession
    url: str
    model: str


async def ask(target: Target, prompt: Ids, output_tokens: int) -> tuple[Record, Ids]:
    """Stream one completion; an error is recorded, not raised."""
    body = {
        "model": target.model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    record, ids = Record(sent=time.perf_counter()), Ids()
    try:
        async with target.session.post(f"{target.url}/v1/completions", json=body) as response:
            if response.status != 200:
                record.error = f"{response.status}: {(await response.text())[:200]}"
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(json.loads(line[6:]), record, ids)
    except (aiohttp.ClientError, TimeoutError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.ended = time.perf_counter()
    if not record.stamps and not record.error:
        record.error = "no output in the stream"
    return record, ids


def _take(event: dict[str, Any], record: Record, ids: Ids) -> None:
    """Read one event of the stream into `record`."""
    if "error" in event:
        record.error = str(event["error"])[:200]
    for choice in event.get("choices", ()):
        new = choice.get("token_ids") or []
        if new or choice.get("text"):
            record.stamps.append(time.perf_counter())
            ids.extend(new)
    usage = event.get("usage")
    if usage:
        record.output_tokens = usage["completion_tokens"]
        record.prompt_tokens = usage["prompt_tokens"]
        record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


async def converse(target: Target, turns: list[Ids], output_tokens: int, records: list[Record], bar: tqdm[Any]) -> None:
    """Send the turns of a session one after the other, each after the answer before it."""
    prompt: Ids = []
    for turn in turns:
        prompt = prompt + turn
        record, answer = await ask(target, prompt, output_tokens)
        records.append(record)
        bar.update()
        if record.error:
            return
        prompt = prompt + answer


async def drive(args: argparse.Namespace, workload: Workload, planned: list[list[Ids]]) -> tuple[list[Record], float]:
    """Run all sessions in closed or open loop; returns the records and the wall time."""
    records: list[Record] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        target = Target(session, args.url, args.model)
        with tqdm(total=sum(map(len, planned)), unit="req", disable=args.quiet) as bar:
            begun = time.perf_counter()

            def run(turns: list[Ids]) -> Awaitable[None]:
                return converse(target, turns, args.output_tokens or workload.output_tokens, records, bar)

            if args.rate:
                rng = random.Random(args.seed)
                arrivals = []
                for turns in planned:
                    arrivals.append(asyncio.ensure_future(run(turns)))
                    await asyncio.sleep(rng.expovariate(args.rate))
                await asyncio.gather(*arrivals)
            else:
                waiting = iter(planned)

                async def client() -> None:
                    for turns in waiting:
                        await run(turns)

                await asyncio.gather(*(client() for _ in range(args.concurrency)))
            return records, time.perf_counter() - begun


def summarise(records: list[Record], wall_s: float) -> dict[str, Any]:
    """The figures of one run; latencies in milliseconds."""
    good = [record for record in records if not record.error]
    gaps = [b - a for record in good for a, b in zip(record.stamps, record.stamps[1:], strict=False)]
    output = sum(record.output_tokens for record in good)
    prompt = sum(record.prompt_tokens for record in good)
    return {
        "wall_s": round(wall_s, 3),
        "requests": len(good),
        "errors": sorted({record.error for record in records if record.error})[:5],
        "requests_per_s": round(len(good) / wall_s, 3),
        "output_tokens_per_s": round(output / wall_s, 2),
        "prompt_tokens": prompt,
        "cached_share": round(sum(record.cached_tokens for record in good) / prompt, 4) if prompt else None,
        "first_token_ms": spread([record.stamps[0] - record.sent for record in good], 1e3),
        "token_gap_ms": spread(gaps, 1e3),
        "time_per_output_token_ms": spread(
            [(r.stamps[-1] - r.stamps[0]) / (r.output_tokens - 1) for r in good if r.output_tokens > 1], 1e3
        ),
        "end_to_end_ms": spread([record.ended - record.sent for record in good], 1e3),
    }


def show(name: str, load: str, result: dict[str, Any]) -> str:
    """The figures as a table for a terminal."""

    def both(key: str) -> str:
        figures = result[key]
        return "-" if figures["p50"] is None else f"{figures['p50']:.2f} / {figures['p99']:.2f} ms"

    rows = [
        ("workload", f"{name}, {load}"),
        ("requests, errors", f"{result['requests']}, {len(result['errors'])} {result['errors'][:1] or ''}"),
        ("requests/s", f"{result['requests_per_s']:.2f}"),
        ("output tokens/s", f"{result['output_tokens_per_s']:.1f}"),
        ("cached share of prompt", f"{result['cached_share']}"),
        ("first token p50 / p99", both("first_token_ms")),
        ("gap between chunks p50 / p99", both("token_gap_ms")),
        ("time per output token p50 / p99", both("time_per_output_token_ms")),
        ("end to end p50 / p99", both("end_to_end_ms")),
    ]
    return table(rows)


def main() -> int:
    """Command line entry; exit status 1 if any request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="server to load (default %(default)s)")
    parser.add_argument("--model", default="default", help="model name to ask for (default %(default)s)")
    names = "; ".join(f"{workload.name}: {workload.about}" for workload in WORKLOADS.values())
    parser.add_argument("--workload", choices=WORKLOADS, default="short", help=names)
    parser.add_argument("--concurrency", type=int, default=4, help="closed loop: clients (default %(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: sessions a second, not --concurrency")
    parser.add_argument("--requests", type=int, default=64, help="requests in all (default %(default)s)")
    parser.add_argument("--output-tokens", type=int, help="tokens per answer (default: the workload's)")
    parser.add_argument("--vocab", type=int, default=4096, help="ids are drawn below this (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="requests sent before, not counted (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="prompts and arrivals follow from it (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request (default %(default)s)")
    parser.add_argument("--out", type=Path, help="append the result to this file of JSON lines")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    if args.warmup:
        warm = argparse.Namespace(**{**vars(args), "rate": 0.0, "concurrency": min(args.warmup, 4), "quiet": True})
        asyncio.run(drive(warm, workload, sessions(workload, args.warmup, args.vocab, args.seed + 1_000_003)))
    planned = sessions(workload, args.requests, args.vocab, args.seed)
    records, wall_s = asyncio.run(drive(args, workload, planned))
    result = summarise(records, wall_s)
    load = f"open loop at {args.rate:g}/s" if args.rate else f"{args.concurrency} at once"
    print(show(workload.name, load, result))
    if args.out:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        append(args.out, {"benchmark": "serve", **context(), "options": options, **result})
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
