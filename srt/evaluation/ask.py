"""Asks a server many problems at once."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import aiohttp
from tqdm import tqdm

from srt.builtin.tasks import FAMILIES, Example, evaluation_set
from srt.evaluation.client import REQUEST_S, Client, ServerFacts
from srt.evaluation.score import Asked


@dataclass(frozen=True)
class Questions:
    """What to ask whom. `families` are names of the registry of tasks; each is asked `count` problems of `seed`."""

    url: str
    families: tuple[str, ...]
    count: int = 300
    concurrency: int = 16
    seed: int = 0
    stream: bool = False
    api_key: str | None = None


@dataclass(frozen=True)
class Answers:
    """Every reply by family, in the order of the problems; families that the server cannot be asked are skipped."""

    server: ServerFacts
    asked: dict[str, list[Asked]]
    skipped: tuple[str, ...]


async def ask_all(questions: Questions, *, quiet: bool = False) -> Answers:
    """Ask everything, `concurrency` problems at a time, families mixed as the requests of a day would be.

    The progress bar goes to a terminal's stderr, unless `quiet`. Raises: StartupError if no server answers.
    """
    headers = {"Authorization": f"Bearer {questions.api_key}"} if questions.api_key else {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=REQUEST_S), headers=headers
    ) as session:
        client = Client(session, questions.url, stream=questions.stream)
        server = await client.facts()
        skipped = [name for name in questions.families if FAMILIES[name].kind == "images" and not server.sees_images]
        names = [name for name in questions.families if name not in skipped]
        todo = [(name, index) for index in range(questions.count) for name in names]
        random.Random(questions.seed).shuffle(todo)
        waiting = iter(todo)
        asked: dict[tuple[str, int], Asked] = {}

        async def work() -> None:
            for name, index in waiting:
                # Beside the event loop: a large image takes longer to draw than a short answer to come.
                example = await asyncio.to_thread(_draw, name, questions.seed, index)
                asked[name, index] = Asked(example, await client.ask(example, server.model))
                bar.update()

        with tqdm(total=len(todo), unit="prompt", disable=True if quiet else None) as bar:
            await asyncio.gather(*(work() for _ in range(questions.concurrency)))
    by_family = {name: [asked[name, index] for index in range(questions.count)] for name in names}
    return Answers(server, by_family, tuple(skipped))


def _draw(family: str, seed: int, index: int) -> Example:
    return evaluation_set(family, 1, seed, start=index)[0]
