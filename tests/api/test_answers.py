"""Several answers to a prompt, log probabilities in each API's form, deadlines, stop expressions."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from srt.tokenizer.vocabulary import Vocabulary
from tests.api.test_generate import events, generate
from tests.support.front import Front
from tests.support.tokens import VOCAB_SIZE

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
SCORED: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}


@pytest.fixture(scope="module")
def client(front: Front) -> openai.OpenAI:
    """A client without retries, so that each error is seen once."""
    return openai.OpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)


# --- n --------------------------------------------------------------------------------------------------


def test_n_answers_have_seeds_that_count_up_and_share_their_prompt(client: openai.OpenAI, front: Front) -> None:
    answer = client.chat.completions.create(model="default", messages=MESSAGES, n=3, seed=40, max_tokens=4)
    admitted = front.scheduler.admitted[-3:]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [admit.sampling.seed for admit in admitted] == [40, 41, 42]
    assert len({admit.token_ids for admit in admitted}) == 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(admitted[0].token_ids) // 4, "counted once"
    assert answer.usage.completion_tokens == 12


def test_a_prompt_is_sent_and_tokenized_once_for_all_its_answers(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = Vocabulary.encode

    def count(self: Vocabulary, text: str, *, add_special_tokens: bool) -> list[int]:
        encoded.append(text)
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Vocabulary, "encode", count)
    body = {"prompt": ["one two", "three four"], "n": 3, "max_tokens": 1}
    assert front.post("/v1/completions", body).status == 200
    assert encoded == ["one two", "three four"]
    assert len({admit.token_ids for admit in front.scheduler.admitted[-6:]}) == 2


def test_answers_without_a_seed_are_drawn_with_different_ones(client: openai.OpenAI, front: Front) -> None:
    client.completions.create(model="default", prompt="x", n=4, max_tokens=1)
    assert len({admit.sampling.seed for admit in front.scheduler.admitted[-4:]}) == 4


def test_a_batch_of_prompts_with_several_answers_each_is_in_the_order_of_prompts(
    client: openai.OpenAI, front: Front
) -> None:
    answer = client.completions.create(model="default", prompt=[[5], [6, 7]], n=2, max_tokens=2, echo=True)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    items = generate(front, input_ids=[[5], [6]], sampling_params={"n": 2, "max_new_tokens": 1}, rid=["a", "b"]).json
    assert [(item["meta_info"]["id"], item["output_ids"]) for item in items] == [
        ("a_0", [5]), ("a_1", [5]), ("b_0", [6]), ("b_1", [6]),
    ]  # fmt: skip
    assert len(generate(front, text="x", sampling_params={"n": 2, "max_new_tokens": 1}).json) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streamed_answers_carry_their_index_and_end_each_once(front: Front, path: str) -> None:
    body = {
        "messages": MESSAGES, "n": 3, "max_tokens": 5, "stream": True, "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if path.endswith("/completions") and "chat" not in path:
        body = {"prompt": "hello", **{key: value for key, value in body.items() if key != "messages"}}
    with front.behaving(step_s=0.002):
        seen = events(front.post(path, body))
    choices = [choice for chunk in seen for choice in chunk["choices"]]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert len(list(chain(*(choice.get("token_ids") or [] for choice in mine)))) == 5
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    order = [choice["index"] for choice in choices]
    assert order != sorted(order), "interleaved"
    assert seen[-1]["usage"]["completion_tokens"] == 15


def test_who_goes_away_ends_all_answers(front: Front) -> None:
    before = len(front.scheduler.aborted)
    with front.behaving(step_s=0.01):
        with pytest.raises(OSError):
            front.request("POST", "/v1/completions", {"prompt": "x", "n": 4, "max_tokens": 400}, timeout_s=0.2)
        front.wait_for(lambda: len(front.scheduler.aborted) == before + 4 and not front.scheduler.rows)


# --- log probabilities: the fake scheduler gives token t -t / 64, and t, t + 1, .. as the most likely ones ------------


def test_a_chats_logprobs_name_each_token_its_bytes_and_the_most_likely_ones(
    client: openai.OpenAI, front: Front, tokenizer: Tokenizer
) -> None:
    asked: dict[str, Any] = {
        "model": "default", "messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2,
        "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    ids: list[int] = choice.model_extra["token_ids"]
    assert [entry.logprob for entry in content] == [-token / 64 for token in ids]
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == tokenizer.decode(
        ids, skip_special_tokens=False
    )
    for token, entry in zip(ids, content, strict=True):
        named = [(top.logprob, top.token) for top in entry.top_logprobs]
        texts = [tokenizer.decode([near], skip_special_tokens=False) for near in (token, token + 1)]
        assert named == [(-0.0, texts[0]), (-0.125, texts[1])]
        assert entry.token == texts[0]
    with front.behaving(step_s=0.002):
        chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content
    plain = client.chat.completions.create(model="default", messages=MESSAGES, max_tokens=1)
    assert plain.choices[0].logprobs is None


def test_a_completions_logprobs_begin_with_the_echoed_prompt(
    client: openai.OpenAI, front: Front, tokenizer: Tokenizer
) -> None:
    prompt = "größer hello 🙂 world"
    ids = tokenizer.encode(prompt).ids
    asked: dict[str, Any] = {"model": "default", "prompt": prompt, "max_tokens": 3, "logprobs": 1, "echo": True}
    choice = client.completions.create(**asked).choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs == [None, *(-token / 64 for token in [*ids[1:], *ids[:3]])]
    assert found.tokens == [tokenizer.decode([token]) for token in [*ids, *ids[:3]]]
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] is None
    assert found.top_logprobs[1] == {tokenizer.decode(ids[1:2]): -0.0}
    assert found.text_offset is not None
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert "\ufffd" in token or choice.text[offset:].startswith(token)
    with front.behaving(step_s=0.002):
        chunks = list(client.completions.create(**asked, stream=True))
    pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for piece in pieces for token in piece.tokens or []] == found.tokens
    assert [offset for piece in pieces for offset in piece.text_offset or []] == found.text_offset
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    scored = client.completions.create(**{**asked, "max_tokens": 0}).choices[0]
    assert (scored.text, scored.finish_reason) == (prompt, "length")
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == found.token_logprobs[: len(ids)]


def test_without_echo_a_completion_tells_of_its_own_tokens_alone(client: openai.OpenAI) -> None:
    found = client.completions.create(model="default", prompt=[5, 6, 7], max_tokens=4, logprobs=0).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == [-5 / 64, -6 / 64, -7 / 64, -5 / 64]
    assert found.text_offset is not None
    assert found.text_offset[0] == 0


def test_generate_lists_logprobs_in_the_native_form(front: Front, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {
        "input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 2}, "return_logprob": True,
        "top_logprobs_num": 1, "token_ids_logprob": [64, 32],
    }  # fmt: skip
    meta = generate(front, **body, logprob_start_len=1).json["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 6, None], [-7 / 64, 7, None], [-8 / 64, 8, None]]
    assert meta["input_top_logprobs"] == [None, [[-0.0, 7, None]], [[-0.0, 8, None]]]
    assert meta["input_token_ids_logprobs"] == [None, *[[[-2.0, 64, None], [-1.0, 32, None]]] * 2]
    assert meta["output_token_logprobs"] == [[-5 / 64, 5, None], [-6 / 64, 6, None]]
    assert meta["output_top_logprobs"] == [[[-0.0, 5, None]], [[-0.0, 6, None]]]
    assert meta["output_token_ids_logprobs"] == [[[-2.0, 64, None], [-1.0, 32, None]]] * 2
    assert meta["output_token_logprobs_length"] == 2
    last = generate(front, **body, return_text_in_logprobs=True).json["meta_info"]
    assert last["input_token_logprobs"] == [[None, 8, tokenizer.decode([8])]], "-1 lists the last token"
    assert last["output_token_ids_logprobs"][0] == [
        [-2.0, 64, tokenizer.decode([64])],
        [-1.0, 32, tokenizer.decode([32])],
    ]
    plain = generate(front, input_ids=[5]).json["meta_info"]
    assert not any("logprob" in name for name in plain)


def test_a_batch_may_want_logprobs_of_some_prompts(front: Front) -> None:
    items = generate(
        front, input_ids=[[5, 6], [7, 8], [9]], sampling_params={"max_new_tokens": 1, "n": 2},
        return_logprob=[True, False, True], logprob_start_len=[0, 0, -1], top_logprobs_num=[0, 0, 2],
    ).json  # fmt: skip
    metas = [item["meta_info"] for item in items]
    assert [len(meta.get("input_token_logprobs", "")) for meta in metas] == [2, 2, 0, 0, 1, 1]
    assert [len(meta["output_top_logprobs"][0]) for meta in metas[4:]] == [2, 2]
    assert metas[0]["output_top_logprobs"] == []


def test_a_streams_logprobs_are_cumulative_like_its_text(front: Front) -> None:
    params = {"max_new_tokens": 6}
    body: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": params, **SCORED}
    with front.behaving(step_s=0.002):
        seen = events(generate(front, **body, stream=True))
    whole = generate(front, **body).json
    for event in seen:
        listed = event["meta_info"]["output_token_logprobs"]
        assert [entry[1] for entry in listed] == event["output_ids"]
        assert event["meta_info"]["output_token_logprobs_length"] == len(listed)
        assert len(event["meta_info"]["input_token_logprobs"]) == 3
    assert seen[-1]["meta_info"]["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"]


def test_a_server_may_send_only_what_is_new(model: Path) -> None:
    body: dict[str, Any] = {"text": "größer hello", "sampling_params": {"max_new_tokens": 9}, **SCORED}
    with Front(model, vocab_size=VOCAB_SIZE, incremental_streaming_output=True) as front:
        with front.behaving(step_s=0.02):
            seen = events(generate(front, **body, stream=True))
        whole = generate(front, **body).json
    assert len(seen) > 1
    assert "".join(event["text"] for event in seen) == whole["text"]
    assert list(chain(*(event["output_ids"] for event in seen))) == whole["output_ids"]
    for side in ("input", "output"):
        name = f"{side}_token_logprobs"
        assert list(chain(*(event["meta_info"][name] for event in seen))) == whole["meta_info"][name]
    assert seen[-1]["meta_info"]["completion_tokens"] == 9


def test_logprobs_end_with_the_token_that_completed_a_stop_text(front: Front, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("hello world, this is").ids
    body: dict[str, Any] = {"input_ids": prompt, "return_logprob": True, "stream": False}
    with front.behaving(tokens_per_step=5):
        item = generate(front, **body, sampling_params={"max_new_tokens": 50, "stop": "o w"}).json
    assert [entry[1] for entry in item["meta_info"]["output_token_logprobs"]] == item["output_ids"]


# --- other ways to end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_a_stop_expression_ends_the_answer_behind_the_token_that_completes_it(
    front: Front, tokenizer: Tokenizer, stream: bool, tokens_per_step: int
) -> None:
    prompt = tokenizer.encode("hello world, this is 12345 67890").ids
    params = {"max_new_tokens": 100, "stop_regex": ["nothing like it", r"i\w \d{3}"], "stop": ["s is 1234567"]}
    with front.behaving(step_s=0.001, tokens_per_step=tokens_per_step):
        answer = generate(front, input_ids=prompt, sampling_params=params, stream=stream)
    last = events(answer)[-1] if stream else answer.json
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": r"i\w \d{3}"}
    assert last["text"] == tokenizer.decode(last["output_ids"])
    assert last["text"].startswith("hello world, this is 123")
    assert not tokenizer.decode(last["output_ids"][:-1]).startswith("hello world, this is 123")


@pytest.mark.parametrize(
    ("pattern", "told"),
    [("(", "missing ): ("), ("(?=a)", "invalid perl operator: (?= (RE2 syntax)"), ("a*", "matches the empty text")],
)
def test_expressions_that_would_backtrack_or_always_match_are_refused(front: Front, pattern: str, told: str) -> None:
    answer = front.post("/v1/completions", {"prompt": "x", "stop_regex": pattern})
    assert answer.status == 400
    assert told in answer.json["error"]["message"]
    assert answer.json["error"]["param"] == "stop_regex"


def test_a_call_that_has_no_token_in_time_is_a_timeout(front: Front) -> None:
    with front.behaving(held=True):
        for stream in (False, True):
            answer = front.post("/v1/completions", {"prompt": "x", "timeout_ms": 50, "stream": stream})
            assert answer.status == 408
            assert answer.json["error"]["message"] == "no token came within 50 ms"
            assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("timeout", "timeout")
    front.wait_for(lambda: not front.scheduler.rows)


def test_a_call_that_takes_too_long_ends_with_what_it_has(front: Front) -> None:
    body: dict[str, Any] = {"text": "hello world", "sampling_params": {"max_new_tokens": 400}, "timeout_ms": 300}
    with front.behaving(step_s=0.01):
        whole = generate(front, **body).json
        streamed = events(generate(front, **body, stream=True))[-1]
    for item in (whole, streamed):
        assert 0 < len(item["output_ids"]) < 400
        assert item["meta_info"]["finish_reason"]["type"] == "abort"
        assert item["meta_info"]["finish_reason"]["message"] == "the call took longer than its timeout_ms of 300"
    assert generate(front, text="x", timeout_ms=10_000).json["meta_info"]["finish_reason"]["type"] == "length"
