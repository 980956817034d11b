"""Seeded request mixes for `benchmarks/serve.py`: each is a list of sessions, a session a list of turns."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens. A turn's prompt is everything before it in its session plus `prompt_tokens` new ones."""

    name: str
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int = 0
    prefix_groups: int = 0
    turns: int = 1
    about: str = ""


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short", 32, 32, about="independent short prompts and answers"),
        Workload("tiny", 8, 1, about="the least work per request: what the plumbing costs"),
        Workload("shared-prefix", 32, 32, prefix_tokens=512, prefix_groups=4, about="four long prefixes shared by all"),
        Workload("multi-turn", 48, 32, prefix_tokens=128, turns=4, about="chats of four turns that grow"),
        Workload("long-prefill", 1536, 8, about="long prompts, first token matters"),
        Workload("long-decode", 32, 512, about="long answers"),
    )
}

Ids = list[int]


def sessions(workload: Workload, requests: int, vocab: int, seed: int) -> list[list[Ids]]:
    """About `requests` turns in sessions; the same arguments give the same ids.

    Ids are drawn from [16, vocab - 32), which leaves out special tokens at both ends of the vocabularies in use.
    """
    rng = random.Random(f"{workload.name}/{seed}")

    def ids(count: int) -> Ids:
        return [rng.randrange(16, vocab - 32) for _ in range(count)]

    heads = [ids(workload.prefix_tokens) for _ in range(workload.prefix_groups)]
    planned: list[list[Ids]] = []
    while sum(map(len, planned)) < requests:
        head = heads[len(planned) % len(heads)] if heads else ids(workload.prefix_tokens)
        turns = [ids(workload.prompt_tokens) for _ in range(min(workload.turns, requests - sum(map(len, planned))))]
        planned.append([head + turns[0], *turns[1:]])
    rng.shuffle(planned)
    return planned
