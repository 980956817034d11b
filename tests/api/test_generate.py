"""/generate: forms of prompts, batches, cumulative streams, stops."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.front import Front
from tests.support.raw import RawConnection
from tests.support.server import Answer


def events(answer: Answer) -> list[dict[str, Any]]:
    """Events of a stream, which must end with [DONE]."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = answer.text.split("\n\n")
    assert chunks[-2:] == ["data: [DONE]", ""]
    assert all(chunk.startswith("data: ") for chunk in chunks[:-1])
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks[:-2]]


def generate(front: Front, **body: Any) -> Answer:
    """POST /generate."""
    answer = front.post("/generate", body)
    assert answer.status == 200, answer.text
    return answer


def test_one_prompt_gets_one_object_in_the_shape_of_the_native_api(front: Front, tokenizer: Tokenizer) -> None:
    body = generate(front, text="hello world", sampling_params={"max_new_tokens": 5}, rid="mine").json
    ids = tokenizer.encode("hello world").ids
    assert body["output_ids"] == (ids * 5)[:5]
    assert body["text"] == tokenizer.decode(body["output_ids"])
    meta = body["meta_info"]
    latency = {key: meta.pop(key) for key in ("e2e_latency", "queue_time", "first_token_latency", "decode_throughput")}
    assert all(value > 0 for value in latency.values())
    assert meta == {
        "id": "mine", "finish_reason": {"type": "length", "length": 5}, "prompt_tokens": len(ids),
        "completion_tokens": 5, "cached_tokens": 0, "reasoning_tokens": 0,
        "cached_tokens_details": {"device": 0, "host": 0}, "num_retractions": 0, "weight_version": "default",
    }  # fmt: skip
    assert "warnings" not in body


def test_no_new_tokens_only_compute_the_prompt(front: Front) -> None:
    first_tokens = front.metric("time_to_first_token_seconds_count")
    body = {"input_ids": [5] * 20, "sampling_params": {"max_new_tokens": 0}}
    whole = generate(front, **body).json
    [streamed] = events(generate(front, **body, stream=True))
    for item in (whole, streamed):
        assert (item["text"], item["output_ids"]) == ("", [])
        assert item["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        assert (item["meta_info"]["prompt_tokens"], item["meta_info"]["completion_tokens"]) == (20, 0)
        assert "first_token_latency" not in item["meta_info"]
    assert front.metric("time_to_first_token_seconds_count") == first_tokens


def test_text_and_ids_are_the_same_prompt(front: Front, tokenizer: Tokenizer) -> None:
    by_text = generate(front, text="größer 数据").json
    by_ids = generate(front, input_ids=tokenizer.encode("größer 数据").ids).json
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert len(by_ids["output_ids"]) == 128, "the native default"
    asked = generate(front, text="größer 数据", return_prompt_token_ids=True).json
    assert asked["prompt_token_ids"] == tokenizer.encode("größer 数据").ids
    assert front.request("PUT", "/generate", {"text": "x"}).status == 200


def test_a_batch_gets_a_list_in_its_order_and_its_own_sampling(front: Front, tokenizer: Tokenizer) -> None:
    texts = ["one", "hello world", "three"]
    params = [{"max_new_tokens": count} for count in (1, 2, 3)]
    answers = generate(front, text=texts, sampling_params=params, rid="b").json
    for index, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        assert answer["output_ids"] == (tokenizer.encode(text).ids * 3)[: index + 1]
        assert answer["meta_info"]["id"] == f"b_{index}"
    assert len(generate(front, input_ids=[[5]]).json) == 1, "a list of one is a list"


def test_a_streams_text_and_ids_are_cumulative_and_end_like_the_whole_answer(front: Front) -> None:
    with front.behaving(step_s=0.002):
        seen = events(generate(front, text="größer 数据 🙂", sampling_params={"max_new_tokens": 20}, stream=True))
    whole = generate(front, text="größer 数据 🙂", sampling_params={"max_new_tokens": 20}).json
    assert len(seen) > 5
    for before, after in pairwise(seen):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
        assert before["meta_info"]["completion_tokens"] == len(before["output_ids"])
    assert (seen[-1]["text"], seen[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    assert seen[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 20}


def test_events_of_a_streamed_batch_carry_their_index(front: Front) -> None:
    seen = events(generate(front, input_ids=[[5], [6]], sampling_params={"max_new_tokens": 3}, stream=True))
    last = {event["index"]: event["output_ids"] for event in seen}
    assert last == {0: [5, 5, 5], 1: [6, 6, 6]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_text_ends_the_answer_and_tells_the_scheduler(
    front: Front, tokenizer: Tokenizer, stream: bool, keep: bool
) -> None:
    prompt = tokenizer.encode("hello world, this is").ids
    params = {"max_new_tokens": 100, "stop": ["o w", "zzz"], "no_stop_trim": keep}
    with front.behaving(step_s=0.001):
        answer = generate(front, input_ids=prompt, sampling_params=params, stream=stream)
    last = events(answer)[-1] if stream else answer.json
    assert last["text"] == ("hello w" if keep else "hell")
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": "o w"}
    counted = last["meta_info"]["completion_tokens"]
    assert tokenizer.decode(prompt[: counted - 1]).find("o w") < 0 <= tokenizer.decode(prompt[:counted]).find("o w")
    front.wait_for(lambda: front.scheduler.matched and not front.scheduler.rows)
    if stream:
        assert not any("o w" in event["text"] for event in events(answer)[:-1])


def test_an_end_of_sequence_id_ends_the_answer_unless_it_is_ignored(front: Front) -> None:
    ended = generate(front, input_ids=[5, 1, 6], sampling_params={"max_new_tokens": 9}).json
    assert ended["output_ids"] == [5, 1]
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}
    ignored = generate(front, input_ids=[5, 1, 6], sampling_params={"max_new_tokens": 9, "ignore_eos": True}).json
    assert ignored["output_ids"] == [5, 1, 6] * 3
    other = generate(front, input_ids=[5, 7, 6], sampling_params={"max_new_tokens": 9, "stop_token_ids": [7]}).json
    assert (other["output_ids"], other["meta_info"]["finish_reason"]["matched"]) == ([5, 7], 7)
    assert other["text"] == generate(front, input_ids=[5], sampling_params={"max_new_tokens": 1}).json["text"]


def test_what_the_checkpoint_and_the_request_say_reaches_the_scheduler(front: Front) -> None:
    generate(front, input_ids=[5, 6], sampling_params={"max_new_tokens": 1, "top_k": 3, "sampling_seed": 11})
    admitted = front.scheduler.admitted[-1]
    assert (admitted.sampling.temperature, admitted.sampling.top_p) == (0.7, 0.9), "from generation_config.json"
    assert (admitted.sampling.top_k, admitted.sampling.seed) == (3, 11)
    assert admitted.received_ns > 0
    for salts in ({"cache_salt": "a", "extra_key": "b"}, {"cache_salt": "ab"}, {"extra_key": "ab"}, {}):
        generate(front, input_ids=[5], sampling_params={"max_new_tokens": 1}, **salts)
    names = [admit.namespace for admit in front.scheduler.admitted[-4:]]
    assert len(set(names)) == 4
    assert names[3] == ""


def test_ignored_fields_are_named_and_counted(front: Front) -> None:
    before = front.metric("warnings_total", kind="unknown_field")
    body = {
        "text": "x",
        "priority": 3,
        "invented": 1,
        "sampling_params": {"max_new_tokens": 1, "made_up": None, "odd": 2},
    }
    answer = generate(front, **body).json
    assert answer["warnings"] == [
        "field 'priority' has no effect: requests are served by the server's policy",
        "unknown field 'invented' was ignored",
        "unknown field 'sampling_params.odd' was ignored",
    ]
    assert front.metric("warnings_total", kind="unknown_field") == before + 2
    with RawConnection(front.port) as connection:
        data = json.dumps(body).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: t\r\nX-Strict: 1\r\nContent-Length: {len(data)}\r\n\r\n"
        status, _, told = connection.send(head.encode() + data).response()
    assert status == 400
    assert b"invented" in told


def test_the_response_carries_a_request_id(front: Front) -> None:
    assert generate(front, text="x", rid="named").headers["x-request-id"] == "named"
    unnamed = generate(front, text="x")
    assert unnamed.headers["x-request-id"] == unnamed.json["meta_info"]["id"]
    with RawConnection(front.port) as connection:
        connection.send(b"GET /v1/models HTTP/1.1\r\nHost: t\r\nX-Request-Id: from-a-proxy\r\n\r\n")
        assert connection.response()[1]["x-request-id"] == "from-a-proxy"
