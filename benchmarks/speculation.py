"""What guessing ahead brings, and that it changes nothing: servers are started by this script, one or two at a time.

    python -m benchmarks.speculation acceptance --count 20
    python -m benchmarks.speculation equality --count 500 --concurrency 32
    python -m benchmarks.speculation speed --rounds 5

`acceptance`: tokens a step by family of the built-in model's tasks, and how many guesses of each place were right.
`equality`: the tokens of answers in many settings against those of a server without guesses, in float32, greedy.
`speed`: output tokens a second with guesses over those without, two servers asked in turn, so that a busy machine slows
both; the median of the rounds' ratios, and the best.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.report import append, context, table
from srt.builtin.tasks import FAMILIES, Example, evaluation_set

MODEL: Final = "builtin:tiny"
START_S: Final = 120.0
SETTLED_S: Final = 1.0
"""After so long the counters tell of all that was answered."""
ANSWER_TOKENS: Final = 160
TASKS: Final = tuple(name for name, family in FAMILIES.items() if family.evaluated and family.kind != "images")
PICTURES: Final = tuple(name for name, family in FAMILIES.items() if family.kind == "images")
SETTINGS: Final[dict[str, tuple[str, ...]]] = {
    "guesses": (),
    "no cache": ("--disable-radix-cache",),
    "pages of one token": ("--page-size", "1"),
    "pages of one token, no cache": ("--page-size", "1", "--disable-radix-cache"),
    "chunks of 7": ("--chunked-prefill-size", "7"),
    "two ranks": ("--tp-size", "2"),
    "n-gram": ("--speculative-algorithm", "ngram"),
}


@contextlib.contextmanager
def serving(*options: str) -> Iterator[str]:
    """A server with these options; yields its address. Raises: RuntimeError if it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = Path(tempfile.mkstemp(prefix="srt-bench-", suffix=".log")[1])
    command = [sys.executable, "-m", "srt.cli", "launch", "--model-path", MODEL, "--port", port, *options]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            asyncio.run(_ready(f"http://127.0.0.1:{port}", process))
            yield f"http://127.0.0.1:{port}"
        except RuntimeError:
            print(log.read_text(errors="replace"), file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()
    os.unlink(log)


async def _ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise RuntimeError(f"no server came up within {START_S} s")


@dataclass(frozen=True)
class Run:
    """What was answered: token ids in the order of the questions, prompt tokens that were cached, and the time."""

    answers: list[list[int]]
    cached_tokens: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))


def body_of(example: Example) -> dict[str, Any]:
    """The request that asks an example."""
    asked: dict[str, Any] = {
        "model": "default", "messages": example.openai_messages(), "max_tokens": ANSWER_TOKENS, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    if example.tools is not None:
        asked["tools"] = list(example.tools)
    if example.effort is not None:
        asked["reasoning_effort"] = example.effort
    return asked


async def ask_all(url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> Run:
    """Ask everything, so many at a time. Raises: aiohttp.ClientError if a request fails."""
    answers: list[list[int]] = [[] for _ in bodies]
    cached = 0
    waiting = iter(enumerate(bodies))
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:

        async def client() -> None:
            nonlocal cached
            for at, body in waiting:
                async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                    answer = await response.json()
                answers[at] = answer["choices"][0]["token_ids"]
                cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return Run(answers, cached, time.perf_counter() - begun)


async def metrics(url: str) -> dict[str, float]:
    """Counters of guesses by name, those with a place as `name/place`."""
    await asyncio.sleep(SETTLED_S)
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        text = await response.text()
    found = {}
    for name, labels, value in re.findall(r"^\w+:(spec_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        place = re.search(r'position="(\d+)"', labels)
        found[f"{name}/{place[1]}" if place else name] = float(value)
    return found


def mix(count: int, families: Sequence[str] = TASKS) -> list[dict[str, Any]]:
    """So many questions, families in turn."""
    each = -(-count // len(families))
    drawn = {name: evaluation_set(name, each) for name in families}
    return [body_of(drawn[name][index]) for index in range(each) for name in families][:count]


def acceptance(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a step and rates by place, for each family and for all."""
    results: dict[str, Any] = {}
    with serving("--dtype", args.dtype) as url:
        asked = [(name, [body_of(example) for example in evaluation_set(name, args.count)]) for name in TASKS]
        before: dict[str, float] = {}
        for name, bodies in asked:
            asyncio.run(ask_all(url, bodies, args.concurrency))
            after = asyncio.run(metrics(url))
            results[name] = rates({key: value - before.get(key, 0) for key, value in after.items()})
            before = after
        results["all"] = rates(before)
    print(table([(name, f"{found['length']:.3f}  {found['places']}") for name, found in results.items()]))
    return results


def rates(counters: dict[str, float]) -> dict[str, Any]:
    """Acceptance length, and the share of steps in which the guess at each place was right."""
    steps, right = counters["spec_verify_steps_total"], counters["spec_accepted_tokens_total"]
    places = [value for key, value in sorted(counters.items()) if "/" in key]
    return {"length": 1 + right / steps, "places": [round(place / steps, 4) for place in places]}


def equality(args: argparse.Namespace) -> dict[str, Any]:
    """How many answers differ in each setting; those with images are asked beside the texts."""
    images = args.count // 20
    bodies = mix(args.count - images) + mix(images, PICTURES)
    with serving("--dtype", "float32", "--speculative-algorithm", "off") as url:
        truth = asyncio.run(ask_all(url, bodies, args.concurrency))
    results: dict[str, Any] = {"off": {"tokens": truth.tokens, "cached_tokens": truth.cached_tokens}}
    print(f"off: {truth.tokens} tokens, {truth.cached_tokens} cached, {truth.seconds:.0f} s", flush=True)
    for name in args.settings or SETTINGS:
        with serving("--dtype", "float32", *SETTINGS[name]) as url:
            run = asyncio.run(ask_all(url, bodies, args.concurrency))
            found = rates(asyncio.run(metrics(url)))
        differing = sum(one != other for one, other in zip(run.answers, truth.answers, strict=True))
        results[name] = {"differing": differing, "cached_tokens": run.cached_tokens, **found}
        print(f"{name}: {differing} of {len(bodies)} differ, {found['length']:.3f} tokens a step, "
              f"{run.cached_tokens} cached, {run.seconds:.0f} s", flush=True)  # fmt: skip
    return results


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of output tokens a second, guesses over none, for each number of clients."""
    results: dict[str, Any] = {}
    with (
        serving("--dtype", args.dtype, "--speculative-algorithm", "off") as plain,
        serving("--dtype", args.dtype, "--speculative-algorithm", args.algorithm) as guessing,
    ):
        for clients in args.clients:
            bodies = mix(max(len(TASKS), args.count * min(4, clients)))
            for url in (plain, guessing):
                asyncio.run(ask_all(url, bodies, clients))
            ratios = []
            for round_ in range(args.rounds):
                both = (plain, guessing) if round_ % 2 else (guessing, plain)
                rate = {}
                for url in both:
                    run = asyncio.run(ask_all(url, bodies, clients))
                    rate[url] = run.tokens / run.seconds
                ratios.append(rate[guessing] / rate[plain])
                print(f"{clients} clients: {rate[plain]:.0f} -> {rate[guessing]:.0f} tokens/s", flush=True)
            results[f"{clients} clients"] = {"median": statistics.median(ratios), "ratios": ratios}
            print(f"{clients} clients: {statistics.median(ratios):.3f} of off, best {max(ratios):.3f}", flush=True)
    return results


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"acceptance": acceptance, "equality": equality, "speed": speed}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--count", type=int, default=20, help="questions: of each family, or in all for equality")
    parser.add_argument("--concurrency", type=int, default=16, help="clients (default %(default)s)")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, help="of equality (all)")
    parser.add_argument("--dtype", default="auto", help="of acceptance and speed (default %(default)s)")
    parser.add_argument("--algorithm", default="auto", help="of speed (default %(default)s)")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16], help="of speed (1 4 16)")
    parser.add_argument("--rounds", type=int, default=5, help="of speed (default %(default)s)")
    parser.add_argument("--out", type=Path, help="append the result to this file of JSON lines")
    args = parser.parse_args()
    results = commands[args.command](args)
    if args.out:
        append(args.out, {"benchmark": f"speculation {args.command}", **context(), "results": results})
    return int(any(found.get("differing", 0) for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
