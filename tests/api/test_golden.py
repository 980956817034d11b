"""Requests and the very bytes of their answers, but for names and times: what clients rely on is written down.

`golden.json` holds them. After a change that is meant, `python -m tests.api.test_golden` writes it anew; look at the
difference before it is committed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.front import Front
from tests.support.server import Answer
from tests.support.tokens import VOCAB_SIZE, write_tokenizer

GOLDEN = Path(__file__).parent / "golden.json"
MASKED = frozenset({"id", "created", "e2e_latency", "queue_time", "first_token_latency", "decode_throughput"})

USER = {"role": "user", "content": "hello"}
NATIVE: dict[str, Any] = {"text": "hello", "sampling_params": {"max_new_tokens": 3}, "rid": "mine"}
COMPLETION: dict[str, Any] = {"model": "test-model", "prompt": "hello", "max_tokens": 3}
CHAT: dict[str, Any] = {"model": "test-model", "messages": [USER], "max_tokens": 3}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
SCORED = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1, "return_text_in_logprobs": True}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", NATIVE),
    "generate streamed": ("/generate", NATIVE | {"stream": True}),
    "generate two answers": ("/generate", NATIVE | {"sampling_params": {"max_new_tokens": 1, "n": 2}}),
    "generate logprobs": ("/generate", NATIVE | SCORED | {"token_ids_logprob": [7]}),
    "generate logprobs streamed": ("/generate", NATIVE | SCORED | {"stream": True}),
    "generate stop": ("/generate", NATIVE | {"sampling_params": {"max_new_tokens": 9, "stop": "lo"}}),
    "generate refused": ("/generate", NATIVE | {"sampling_params": {"top_p": 2}}),
    "completion": ("/v1/completions", COMPLETION),
    "completion streamed": ("/v1/completions", COMPLETION | STREAMED),
    "completion two answers": ("/v1/completions", COMPLETION | {"n": 2, "return_token_ids": True}),
    "completion logprobs": ("/v1/completions", COMPLETION | {"logprobs": 1, "echo": True}),
    "completion logprobs streamed": ("/v1/completions", COMPLETION | STREAMED | {"logprobs": 1, "echo": True}),
    "completion refused": ("/v1/completions", COMPLETION | {"best_of": 2}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat streamed": ("/v1/chat/completions", CHAT | STREAMED),
    "chat two answers": ("/v1/chat/completions", CHAT | {"n": 2}),
    "chat two answers streamed": ("/v1/chat/completions", CHAT | STREAMED | {"n": 2, "max_tokens": 1}),
    "chat logprobs": ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
    "chat logprobs streamed": ("/v1/chat/completions", CHAT | STREAMED | {"logprobs": True, "top_logprobs": 1}),
    "chat warned": ("/v1/chat/completions", CHAT | {"store": True, "invented": 1}),
    "chat refused": ("/v1/chat/completions", CHAT | {"model": "other"}),
}


def masked(value: Any) -> Any:
    """A body without what differs from run to run."""
    match value:
        case dict():
            return {
                key: "*" if key in MASKED and value[key] != "mine" else masked(entry) for key, entry in value.items()
            }
        case list():
            return [masked(entry) for entry in value]
        case _:
            return value


def told(answer: Answer) -> Any:
    """A body, or the events of a stream; several answers are told one after the other."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return masked(answer.json)
    lines = answer.text.removesuffix("\n\n").split("\n\n")
    assert lines.pop() == "data: [DONE]"
    seen = [masked(json.loads(line.removeprefix("data: "))) for line in lines]
    return sorted(seen, key=_index)


def _index(event: dict[str, Any]) -> int:
    match event:
        case {"choices": []}:
            return 99
        case {"choices": [{"index": int(index)}]}:
            return index
        case _:
            return 0


def asked(front: Front, name: str) -> dict[str, Any]:
    """Ask a server that makes the whole answer in one step, so that the events of a stream are always cut alike."""
    path, body = REQUESTS[name]
    with front.behaving(tokens_per_step=9):
        answer = front.post(path, body)
    return {"path": path, "request": body, "status": answer.status, "answer": told(answer)}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_is_the_one_that_is_written_down(front: Front, name: str) -> None:
    assert asked(front, name) == json.loads(GOLDEN.read_text())[name]


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        options: dict[str, Any] = {"served_model_name": "test-model", "max_body_bytes": 200_000}
        with Front(Path(directory), vocab_size=VOCAB_SIZE, **options) as front:
            golden = {name: asked(front, name) for name in REQUESTS}
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
