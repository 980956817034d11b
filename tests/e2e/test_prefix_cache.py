"""What `cached_tokens` says over HTTP: the longest prefix served before, floored to pages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.server import Server
from tests.support.workload import Request, generate


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Oracle:
    """Remembers the sequences whose KV was computed: prompts and answers, without an answer's last token."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.computed: list[tuple[int, ...]] = []

    def cached(self, prompt: tuple[int, ...]) -> int:
        """Tokens that a perfect prefix cache would not compute again; at least one is left to compute."""
        longest = max((shared(prompt, known) for known in self.computed), default=0)
        return min(longest, len(prompt) - 1) // self.page_size * self.page_size

    def served(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
        """A request has been answered."""
        self.computed.append(prompt + output[:-1])


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_25_a_trace_of_chats_hits_exactly_what_an_oracle_says_with_draft_modules(page_size: int, nano: Path) -> None:
    rng = random.Random(page_size)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(16, 4000) for _ in range(n))

    oracle = Oracle(page_size)
    systems = [ids(n) for n in (3, 70, 200)]
    chats = [rng.choice(systems) + ids(rng.randrange(1, 60)) for _ in range(8)]
    options = ("--dtype", "float32", "--page-size", str(page_size))
    with Server("--model-path", str(nano), *options) as server:
        for _ in range(40):
            at = rng.randrange(len(chats))
            prompt = chats[at]
            answer = generate(server, Request(prompt, rng.choice((1, 5, 33))))
            assert answer["meta_info"]["cached_tokens"] == oracle.cached(prompt), f"prompt of {len(prompt)} tokens"
            output = tuple(answer["output_ids"])
            oracle.served(prompt, output)
            chats[at] = prompt + output + ids(rng.randrange(1, 50))
            if len(chats[at]) > 700:
                chats[at] = rng.choice(systems) + ids(rng.randrange(1, 60))
        assert server.metric("spec_draft_tokens_total") > 0


def test_flushing_forgets_every_prefix(server: Server) -> None:
    request = Request(tuple(range(100, 200)), 4)
    generate(server, request)
    assert generate(server, request)["meta_info"]["cached_tokens"] == 96
    assert server.post("/flush_cache").status == 200
    assert generate(server, request)["meta_info"]["cached_tokens"] == 0


def test_namespaces_never_share_a_prefix(server: Server) -> None:
    prompt = list(range(300, 400))

    def cached(**extra: str) -> int:
        params = {"temperature": 0, "max_new_tokens": 1}
        answer = server.post("/generate", {"input_ids": prompt, "sampling_params": params, **extra})
        assert answer.status == 200, answer.text
        return int(answer.json["meta_info"]["cached_tokens"])

    assert [cached(cache_salt="a"), cached(cache_salt="b"), cached(extra_key="a"), cached()] == [0, 0, 0, 0]
    assert [cached(cache_salt="a"), cached(cache_salt="b"), cached(extra_key="a"), cached()] == [96, 96, 96, 96]
