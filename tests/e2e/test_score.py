"""Label scoring against the log probabilities of a plain request."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.server import Server


def test_labels_are_scored_as_the_log_probabilities_of_a_completion_say(builtin: Server) -> None:
    prompts = ["What is 2 + 2?", "Who are you?"]
    labels = builtin.post("/tokenize", {"prompt": "yes no maybe"}).json["tokens"][:3]
    body: dict[str, Any] = {"query": "A question: ", "items": prompts, "label_token_ids": labels}
    scores = builtin.post("/v1/score", body).json["scores"]
    for prompt, row in zip(prompts, scores, strict=True):
        asked: dict[str, Any] = {"text": "A question: " + prompt, "sampling_params": {"max_new_tokens": 1}}
        asked |= {"return_logprob": True, "token_ids_logprob": labels}
        told = builtin.post("/generate", asked).json["meta_info"]["output_token_ids_logprobs"][0]
        assert row == pytest.approx([math.exp(value) for value, _, _ in told], rel=1e-4)
    among = builtin.post("/v1/score", body | {"apply_softmax": True}).json["scores"][0]
    assert sum(among) == pytest.approx(1)
    assert among == pytest.approx([value / sum(scores[0]) for value in scores[0]], rel=1e-4)
    ids = [builtin.post("/tokenize", {"prompt": text}).json["tokens"] for text in ("A question: ", *prompts)]
    by_ids = builtin.post("/v1/score", {"query": ids[0], "items": ids[1:], "label_token_ids": labels}).json
    assert len(by_ids["scores"]) == 2
    for wrong, word in (
        ({"label_token_ids": []}, "1 to 128"),
        ({"label_token_ids": [1 << 30]}, "token ids of this model"),
        ({"query": [1]}, "both token ids"),
        ({"items": []}, "is empty"),
    ):
        answer = builtin.post("/v1/score", body | wrong)
        assert answer.status == 400
        assert word in answer.json["error"]["message"]
