"""The real `openai` client against the real server."""

from __future__ import annotations

import openai
import pytest

from tests.support.server import Server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """A client without retries, so that each error is seen once."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_a_chat_answers_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    whole = client.chat.completions.create(model="default", messages=messages, max_tokens=24, temperature=0)  # type: ignore[arg-type]
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            model="default",
            messages=messages,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details is not None
    assert whole.choices[0].finish_reason in ("length", "stop")


def test_completions_take_every_form_of_prompt(client: openai.OpenAI) -> None:
    by_text = client.completions.create(model="default", prompt="The import statement", max_tokens=8, temperature=0)
    ids = client.post("/tokenize", body={"prompt": "The import statement"}, cast_to=object, options={})
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == ids["count"]  # type: ignore[index]
    by_ids = client.completions.create(model="default", prompt=ids["tokens"], max_tokens=8, temperature=0)  # type: ignore[index]
    assert by_ids.choices[0].text == by_text.choices[0].text


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="default", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model="default", prompt=[5] * 9000)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="default", prompt="x", best_of=3)


def test_a_stop_string_ends_a_stream_without_leaking(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="default", prompt="The", max_tokens=60, temperature=0).choices[0].text
    stop = whole[10:14]
    cut = whole[: whole.index(stop)]
    stream = client.completions.create(
        model="default", prompt="The", max_tokens=60, temperature=0, stop=[stop], stream=True
    )
    seen = ""
    for chunk in stream:
        seen += chunk.choices[0].text if chunk.choices else ""
        assert cut.startswith(seen)
    assert seen == cut
