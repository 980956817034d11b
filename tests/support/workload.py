"""Seeded request mixes and the Hugging Face truth about them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tests.support.server import Server

if TYPE_CHECKING:
    from pathlib import Path

MARGIN = 1e-4
"""A greedy token may differ from Hugging Face only where its own two best logits are closer than this."""


@dataclass(frozen=True)
class Request:
    """A prompt as token ids and how many tokens to generate."""

    prompt: tuple[int, ...]
    new_tokens: int


def mixed_requests(count: int, vocab: int, seed: int, longest: int = 2000) -> list[Request]:
    """Prompts of 1 to `longest` tokens; two in three begin with one of eight shared prefixes."""
    rng = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(16, vocab - 32) for _ in range(n))

    prefixes = [ids(rng.choice((5, 16, 100, 333, 512, 800))) for _ in range(8)]
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, longest - 1, longest]
    requests = []
    for index in range(count):
        length = lengths[index] if index < len(lengths) else int(longest ** rng.uniform(0.2, 1.0))
        head = rng.choice(prefixes)[:length] if rng.random() < 0.67 else ()
        requests.append(Request(head + ids(length - len(head)), rng.choice((1, 4, 16, 24, 40))))
    rng.shuffle(requests)
    return requests


def long_answers(count: int, vocab: int, seed: int) -> list[Request]:
    """Short prompts whose answers outgrow what a small pool was expected to need: they force retractions."""
    rng = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(16, vocab - 32) for _ in range(n))

    return [Request(ids(rng.randint(1, 200)), rng.choice((60, 120, 240))) for _ in range(count)]


def generate(server: Server, request: Request, **sampling: Any) -> dict[str, Any]:
    """One native request, greedy unless told otherwise; returns the response object."""
    params = {"temperature": 0, "max_new_tokens": request.new_tokens, "ignore_eos": True, **sampling}
    answer = server.post("/generate", {"input_ids": list(request.prompt), "sampling_params": params})
    assert answer.status == 200, answer.text
    result: dict[str, Any] = answer.json
    return result


def generate_all(server: Server, requests: list[Request], at_once: int = 32, **sampling: Any) -> list[dict[str, Any]]:
    """All requests, `at_once` in flight; responses in the order of the requests."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda request: generate(server, request, **sampling), requests))


class HuggingFace:
    """The checkpoint in transformers, fp32 on the CPU: the truth about greedy answers."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import Step3p7ForConditionalGeneration

        self.model = Step3p7ForConditionalGeneration.from_pretrained(str(checkpoint), dtype=torch.float32).eval()

    def logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Logits of every position, [len(ids), vocab] float32."""
        with torch.inference_mode():
            result: torch.Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        return result

    def disagreement(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> str | None:
        """The first token of `output` that greedy decoding would not have chosen, or None.

        Teacher-forcing the answer is the same as generating it: each token is compared given equal ones before it.
        A token within `MARGIN` of the best logit counts as equal.
        """
        logits = self.logits(prompt + output[:-1])[len(prompt) - 1 :]
        best = logits.max(dim=-1).values
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        worse = ((best - chosen) >= MARGIN).nonzero()
        if len(worse) == 0:
            return None
        at = int(worse[0])
        gap = float(best[at] - chosen[at])
        return f"token {at} of {len(output)} after {len(prompt)}: {output[at]} is {gap:.2e} below the best"
