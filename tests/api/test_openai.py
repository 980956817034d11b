"""The OpenAI API, through OpenAI's own client."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.api.test_generate import events
from tests.support.front import Front

MESSAGES: list[Any] = [{"role": "user", "content": "Say something größer."}]


@pytest.fixture(scope="module")
def client(front: Front) -> openai.OpenAI:
    """A client without retries, so that each error is seen once."""
    return openai.OpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)


def test_a_chat_is_the_same_streamed_and_whole(client: openai.OpenAI, front: Front) -> None:
    whole = client.chat.completions.create(model="test-model", messages=MESSAGES, max_tokens=12)
    with front.behaving(step_s=0.002):
        stream = client.chat.completions.create(
            model="test-model", messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert whole.id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage == whole.usage
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == (whole.usage.prompt_tokens - 1) // 16 * 16


def test_a_chat_reads_the_prompt_that_tokenize_shows(client: openai.OpenAI, front: Front, tokenizer: Tokenizer) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    shown = front.post("/tokenize", {"messages": MESSAGES, "tools": tools, "reasoning_effort": "high"}).json
    answer = client.chat.completions.create(
        model="default", messages=MESSAGES, tools=tools, reasoning_effort="high", max_tokens=1,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == shown["tokens"]
    assert shown["count"] == len(shown["tokens"]) == answer.usage.prompt_tokens  # type: ignore[union-attr]
    text = tokenizer.decode(shown["tokens"], skip_special_tokens=False)
    assert '"name": "look_up"' in text
    assert "Reasoning: high" in text
    hidden = front.post("/tokenize", {"messages": MESSAGES, "tools": tools, "tool_choice": "none"}).json
    assert "look_up" not in tokenizer.decode(hidden["tokens"], skip_special_tokens=False)


def test_completions_take_every_form_of_prompt(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world").ids
    forms: list[Any] = ["hello world", ["hello world"], ids, [ids]]
    texts = [client.completions.create(model="default", prompt=form).choices[0].text for form in forms]
    assert len(set(texts)) == 1
    assert texts[0] == tokenizer.decode((ids * 16)[:16]), "16 tokens unless asked otherwise"
    several = client.completions.create(model="default", prompt=["a", "hello world"], max_tokens=3)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[1].text == tokenizer.decode((ids * 3)[:3])
    assert several.usage is not None
    assert several.usage.completion_tokens == 6


def test_echo_begins_with_the_prompt_whatever_its_form(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    plain = client.completions.create(model="default", prompt="hello world", max_tokens=3).choices[0].text
    for form in ("hello world", tokenizer.encode("hello world").ids):
        echoed = client.completions.create(model="default", prompt=form, echo=True, max_tokens=3)
        assert echoed.choices[0].text == "hello world" + plain
        stream = client.completions.create(model="default", prompt=form, echo=True, max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "hello world" + plain


def test_a_streamed_completion_ends_with_its_finish_and_then_the_usage(front: Front) -> None:
    body = {
        "model": "default", "prompt": [[5], [6]], "max_tokens": 4, "stream": True, "return_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    with front.behaving(step_s=0.002):
        seen = events(front.post("/v1/completions", body))
    assert seen[-1]["choices"] == []
    assert seen[-1]["usage"]["completion_tokens"] == 8
    for index, token in ((0, 5), (1, 6)):
        choices = [chunk["choices"][0] for chunk in seen[:-1] if chunk["choices"][0]["index"] == index]
        assert list(chain(*(choice["token_ids"] for choice in choices))) == [token] * 4
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
        assert all("usage" in chunk for chunk in seen[:-1])


def test_a_stop_text_never_leaks_into_a_stream(client: openai.OpenAI, front: Front) -> None:
    whole = client.completions.create(model="default", prompt="hello world, this is", max_tokens=40).choices[0].text
    stop = whole[9:14]
    with front.behaving(step_s=0.001):
        seen = ""
        last = None
        stream = client.completions.create(
            model="default", prompt="hello world, this is", max_tokens=40, stop=[stop], stream=True
        )
        for chunk in stream:
            seen += chunk.choices[0].text
            assert whole[:9].startswith(seen)
            last = chunk.choices[0]
    assert seen == whole[: whole.index(stop)]
    assert last is not None
    assert (last.finish_reason, last.model_extra) == ("stop", {"matched_stop": stop, "stop_reason": stop})


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model") as missing:
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature") as cold:
        client.completions.create(model="default", prompt="x", temperature=-1)
    assert (cold.value.code, cold.value.param, cold.value.type) == (
        "invalid_request",
        "temperature",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match=r"900 tokens.*512") as long:
        client.completions.create(model="default", prompt=[5] * 900)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"600 new tokens .* 512") as many:
        client.chat.completions.create(model="default", messages=MESSAGES, max_completion_tokens=600, stream=True)
    assert many.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError, match="'best_of' is not supported with the value 3") as several:
        client.completions.create(model="default", prompt="x", best_of=3)
    assert several.value.code == "unsupported_field"


def test_neutral_values_of_unsupported_fields_are_accepted_in_silence(front: Front) -> None:
    neutral = {
        "n": 1, "best_of": 1, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "logit_bias": {}, "response_format": {"type": "text"}, "suffix": "", "echo": False,
    }  # fmt: skip
    answer = front.post("/v1/completions", {"prompt": "x", **neutral})
    assert answer.status == 200, answer.text
    assert "warnings" not in answer.json
    chat = front.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "user": "me", "logprobs": False})
    assert chat.json["warnings"] == ["field 'user' has no effect: not used"]
    streamed = events(
        front.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "user": "me", "stream": True})
    )
    assert streamed[0]["warnings"] == chat.json["warnings"]


def test_a_refused_prompt_within_a_batch_fails_the_call_with_its_status(front: Front) -> None:
    with front.behaving(max_live=1, held=True):
        front.wait_for(lambda: not front.scheduler.rows)
        answer = front.post("/v1/completions", {"prompt": ["a", "b", "c"], "stream": True})
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json["error"]["code"] == "queue_full"
    assert "limit is 1" in answer.json["error"]["message"]
    front.wait_for(lambda: not front.scheduler.rows)


def test_models_are_listed_and_found_by_name(client: openai.OpenAI, front: Front) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("test-model", "model")
    assert client.models.retrieve("test-model").id == "test-model"
    card = json.loads(front.get("/v1/models").body)["data"][0]
    assert card["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
