"""Log probabilities and several answers over HTTP: against transformers, whatever the server does to be fast."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.server import Server
from tests.support.workload import HuggingFace, Request, long_answers, mixed_requests

TOLERANCE = 1e-4
VOCABULARY = 4096
LISTED = [50, 7]

SETTINGS: dict[str, tuple[str, ...]] = {
    "guesses and small chunks": ("--speculative-algorithm", "auto", "--chunked-prefill-size", "48"),
    "a tiny pool": ("--context-length", "1024", "--max-total-tokens", "1024"),
    "pages of one token, no overlap, two ranks": ("--page-size", "1", "--disable-overlap-schedule", "--tp-size", "2"),
}


def ask(server: Server, request: Request, start: int) -> dict[str, Any]:
    """A request with everything that may be told, drawn with all that must not show in it."""
    body = {
        "input_ids": list(request.prompt),
        "sampling_params": {
            "max_new_tokens": request.new_tokens, "ignore_eos": True, "temperature": 0.8, "sampling_seed": start,
            "top_k": 50, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {"100": 1.5},
        },
        "return_logprob": True, "logprob_start_len": start, "top_logprobs_num": 3, "token_ids_logprob": LISTED,
    }  # fmt: skip
    answer = server.post("/generate", body)
    assert answer.status == 200, answer.text
    result: dict[str, Any] = answer.json
    return result


def assert_right(truth: HuggingFace, request: Request, start: int, answer: dict[str, Any]) -> None:
    """All that an answer tells of its positions is what transformers says of them."""
    tokens = (*request.prompt, *answer["output_ids"])
    after = truth.logits(tokens[:-1]).log_softmax(-1)
    meta, size = answer["meta_info"], len(request.prompt)
    assert meta["cached_tokens"] <= start
    assert meta["input_token_logprobs"][0] == [None, tokens[start], None]
    assert meta["input_top_logprobs"][0] is meta["input_token_ids_logprobs"][0] is None
    told = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]
    tops = meta["input_top_logprobs"][1:] + meta["output_top_logprobs"]
    listed = meta["input_token_ids_logprobs"][1:] + meta["output_token_ids_logprobs"]
    places = [*range(start + 1, size), *range(size, len(tokens))]
    assert len(told) == len(tops) == len(listed) == len(places)
    for place, (value, token, _), top, ids in zip(places, told, tops, listed, strict=True):
        row = after[place - 1]
        assert token == tokens[place]
        assert abs(value - row[token].item()) < TOLERANCE, f"position {place}"
        best = row.topk(3).values.tolist()
        for (value, token, _), expected in zip(top, best, strict=True):
            assert abs(value - expected) < TOLERANCE
            assert abs(value - row[token].item()) < TOLERANCE
        assert [token for _, token, _ in ids] == LISTED
        assert torch.allclose(torch.tensor([value for value, *_ in ids]), row[LISTED], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs_equal_hugging_face_under_hits_chunks_guesses_and_retractions(
    setting: str, nano: Path, truth: HuggingFace
) -> None:
    rng = random.Random(4)
    requests = mixed_requests(20, VOCABULARY, seed=8, longest=500)
    if setting == "a tiny pool":
        requests = long_answers(16, VOCABULARY, seed=5)
    starts = [rng.choice((0, rng.randrange(len(request.prompt)), len(request.prompt) - 1)) for request in requests]
    with Server("--model-path", str(nano), "--dtype", "float32", *SETTINGS[setting]) as server:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda each: ask(server, *each), zip(requests, starts, strict=True)))
        assert server.metric("kv_pages_leaked") == 0
        if setting == "a tiny pool":
            assert server.metric("num_retracted_requests_total") > 0
        else:
            assert any(answer["meta_info"]["cached_tokens"] for answer in answers)
    for request, start, answer in zip(requests, starts, answers, strict=True):
        assert_right(truth, request, start, answer)


def test_answers_to_one_prompt_are_computed_from_one_prefill_and_equal_single_ones(server: Server) -> None:
    prompt = list(range(700, 800))

    def ask_for(seed: int, n: int) -> Any:
        params = {"max_new_tokens": 12, "temperature": 1.0, "sampling_seed": seed, "n": n}
        answer = server.post("/generate", {"input_ids": prompt, "sampling_params": params})
        assert answer.status == 200, answer.text
        return answer.json

    together = ask_for(30, 4)
    assert [item["meta_info"]["cached_tokens"] for item in together] == [0, 96, 96, 96]
    assert [item["output_ids"] for item in together] == [ask_for(seed, 1)["output_ids"] for seed in range(30, 34)]
    assert len({tuple(item["output_ids"]) for item in together}) == 4
