"""`server batch IN.jsonl OUT.jsonl`: a file of OpenAI batch lines, answered into another, resumed after a kill."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import aiohttp
import msgspec
import orjson
from tqdm import tqdm

from srt.command_line import CommandParser
from srt.commands.servers import Server, reached
from srt.errors import ProcessLost, StartupError

ABOUT: Final = """\
Answer every line of a file of requests, in the form of OpenAI's batch API:

  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

Each becomes a line of the other file, in the order in which they end. Run again, lines that have an answer are left
out, so what a kill interrupted goes on where it was; the number of lines is the number of requests in the end.
"""
EXAMPLES: Final = """\
examples:
  server batch in.jsonl out.jsonl
      with the built-in model, started for it and ended after it
  server batch in.jsonl out.jsonl --model-path ./step-3.7-flash --context-length 32768
      with a checkpoint; further options are those of server launch
  server batch in.jsonl out.jsonl --url http://127.0.0.1:30000 --concurrency 32
      with a server that runs
"""
ROUTES: Final = ("/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses", "/v1/messages")
INTERRUPTED: Final = 130
OVERLOADED: Final = (429, 503)
RETRY_S: Final = 0.5


class Line(msgspec.Struct, frozen=True):
    """One request of the file."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


def parser() -> argparse.ArgumentParser:
    """The parser of `server batch`."""
    made = CommandParser(
        "server batch",
        description=ABOUT,
        epilog=EXAMPLES,
    )
    made.add_argument("requests", type=Path, metavar="IN.jsonl", help="file of requests")
    made.add_argument("answers", type=Path, metavar="OUT.jsonl", help="file of answers; is added to")
    made.add_argument("--url", help="a server that runs; without it one is started for the file")
    made.add_argument("--api-key", metavar="KEY", help="the key of the server at --url; also read from SRT_API_KEY")
    made.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests at a time (64)")
    return made


def run(arguments: Sequence[str], environment_key: str | None = None) -> int:
    """Answer the file. Returns 0, 1 if answers are errors, 130 if interrupted.

    Raises: StartupError if an option, a file or a line of it is wrong, or no server can be reached.
    """
    options, launch = parser().parse_known_args(arguments)
    if options.concurrency < 1:
        raise StartupError(f"--concurrency is {options.concurrency}; the smallest value is 1")
    lines = read_lines(options.requests)
    if options.answers.exists() and options.answers.samefile(options.requests):
        raise StartupError(f"{options.answers} holds the requests; name another file for the answers")
    done = resume(options.answers)
    missing = [line for line in lines if line.custom_id not in done]
    if done:
        print(f"{len(lines) - len(missing)} of {len(lines)} are answered already", file=sys.stderr)
    if not missing:
        return 0
    try:
        with _opened(options.answers) as file:
            work = answer_all(
                missing, file, options.concurrency, options.url, options.api_key or environment_key, launch
            )
            failed = asyncio.run(work)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(f"{len(missing) - failed} answered, {failed} with an error", file=sys.stderr)
    return 1 if failed else 0


def read_lines(path: Path) -> list[Line]:
    """All requests. Raises: StartupError with the number of the first line that is none."""
    lines: list[Line] = []
    seen: set[str] = set()
    for number, raw in enumerate(_raw_lines(path), 1):
        if not raw.strip():
            continue
        try:
            line = msgspec.json.decode(raw, type=Line)
        except msgspec.MsgspecError as error:
            raise StartupError(f"{path}, line {number}: {error}") from error
        if line.method != "POST" or line.url not in ROUTES:
            raise StartupError(
                f"{path}, line {number}: {line.method} {line.url} is not one of POST {', '.join(ROUTES)}"
            )
        if line.body.get("stream"):
            raise StartupError(f"{path}, line {number}: `stream` is true; answers in a file are whole")
        if line.custom_id in seen:
            raise StartupError(f"{path}, line {number}: the custom_id {line.custom_id!r} has come before")
        seen.add(line.custom_id)
        lines.append(line)
    if not lines:
        raise StartupError(f"{path} holds no requests")
    return lines


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from error


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from error


def resume(path: Path) -> set[str]:
    """Ids that have an answer. A last line that a kill cut off is removed.

    Raises: StartupError if the file holds anything else.
    """
    done: set[str] = set()
    if not path.exists():
        return done
    whole = 0
    for number, raw in enumerate(_raw_lines(path), 1):
        if not raw.endswith(b"\n"):
            break
        try:
            done.add(orjson.loads(raw)["custom_id"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise StartupError(f"{path}, line {number} is no answer; name another file") from error
        whole += len(raw)
    os.truncate(path, whole)
    return done


async def answer_all(
    lines: Sequence[Line], file: BinaryIO, concurrency: int, url: str | None, api_key: str | None, launch: list[str]
) -> int:
    """Answer lines, several at a time, into the file. Returns how many answers are errors."""
    async with reached(url, api_key, launch) as server:
        todo = iter(lines)
        failed = 0
        with tqdm(total=len(lines), unit="request", disable=not sys.stderr.isatty()) as bar:

            async def work() -> None:
                nonlocal failed
                for line in todo:
                    answer = await _answer(server, line)
                    failed += answer["error"] is not None or answer["response"]["status_code"] != 200
                    file.write(msgspec.json.encode(answer) + b"\n")
                    file.flush()
                    bar.update()

            workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(lines)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        return failed


async def _answer(server: Server, line: Line) -> dict[str, Any]:
    """The answer to one line, as OpenAI's batch API gives it. An overloaded server is asked again."""
    answer: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    try:
        while (response := await server.post(line.url, line.body)).status in OVERLOADED:
            await asyncio.sleep(RETRY_S)
    except (aiohttp.ClientError, TimeoutError, ProcessLost) as error:
        raise StartupError(f"the server is gone: {error}; what was answered is kept") from error
    told = {"status_code": response.status, "request_id": response.headers.get("x-request-id", "")}
    return answer | {"response": told | {"body": msgspec.Raw(response.body)}, "error": None}
