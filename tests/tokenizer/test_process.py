"""The tokenizer process between an api and a scheduler that are tests: every request ends once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from srt.errors import ErrorCode
from srt.messages import (
    Abort,
    Admit,
    Cancel,
    ChatPrompt,
    Delta,
    Deltas,
    Emission,
    Emitted,
    Finish,
    Generate,
    SamplingParams,
    StopMatched,
    TextPrompt,
    ToApi,
    TokenPrompt,
    ToScheduler,
)
from srt.tokenizer.process import TokenizerProcess
from srt.tokenizer.prompt import pack_ids
from srt.wire import Inbox, Outbox
from tests.support.front import make_plan
from tests.support.tokens import VOCAB_SIZE


class Between:
    """The process and both its neighbours, in one thread."""

    def __init__(self, model: Path, rundir: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.api: Inbox[ToApi] = Inbox(self.context, rundir, "api", ToApi)
        self.scheduler: Inbox[ToScheduler] = Inbox(self.context, rundir, "scheduler", ToScheduler)
        self.process = TokenizerProcess(make_plan(model, 0, vocab_size=VOCAB_SIZE), rundir, self.context)
        self.box = Outbox(self.context, rundir, "tokenizer")

    def tell(self, *messages: Any) -> None:
        """Hand messages to the process as if they had come together."""
        for message in messages:
            self.process.receive(message)

    def heard_by(self, inbox: Inbox[Any], count: int) -> list[Any]:
        """The next `count` messages of a neighbour."""
        heard: list[Any] = []
        while len(heard) < count:
            assert inbox.wait(2000), f"only {heard}"
            heard += inbox.drain()
        return heard


@pytest.fixture
def between(model: Path, tmp_path: Path) -> Iterator[Between]:
    """A fresh process."""
    standing = Between(model, tmp_path)
    yield standing
    standing.process.close()
    standing.box.close()
    standing.api.close()
    standing.scheduler.close()
    standing.context.term()


def request(rid: str, **sampling: Any) -> Generate:
    """A streamed request."""
    return Generate(rid, TextPrompt("hello world"), SamplingParams(**sampling), stream=True)


def chat(rid: str, *messages: dict[str, Any]) -> Generate:
    """A chat request."""
    return Generate(rid, ChatPrompt(json.dumps(messages).encode()), SamplingParams(), stream=True)


def test_a_request_that_is_cancelled_before_its_prompt_was_tokenized_never_reaches_the_scheduler(
    between: Between,
) -> None:
    between.tell(request("a"), request("b"), Cancel("a"))
    [closing] = between.heard_by(between.api, 1)
    assert closing == Deltas([Delta("a", finish=closing.deltas[0].finish)])
    assert closing.deltas[0].finish.kind == "abort"
    between.box.send(Cancel("nobody"))
    between.process.turn()
    [admitted] = between.heard_by(between.scheduler, 1)
    assert admitted.rid == "b"


def test_a_cancelled_running_request_is_closed_by_the_scheduler(between: Between) -> None:
    between.tell(request("a"))
    between.process.turn()
    between.tell(Cancel("a"))
    admitted, aborted = between.heard_by(between.scheduler, 2)
    assert isinstance(admitted, Admit)
    assert aborted == Abort("a")
    between.tell(Emitted([Emission("a", (5,), Finish("abort", text="gone"))]))
    [closing] = between.heard_by(between.api, 1)
    assert closing.deltas[0].finish == Finish("abort", text="gone")
    assert not between.process.answers


def test_after_a_stop_text_what_still_comes_is_for_nobody(between: Between) -> None:
    between.tell(request("a", stop=("o",)))
    between.process.turn()
    ids = between.process.vocabulary.encode("hello world", add_special_tokens=False)
    between.tell(Emitted([Emission("a", tuple(ids))]), Cancel("a"))
    [closing] = between.heard_by(between.api, 1)
    assert (closing.deltas[0].text, closing.deltas[0].finish) == ("hell", Finish("stop", "o"))
    assert between.heard_by(between.scheduler, 2)[1] == StopMatched("a")
    between.tell(Emitted([Emission("a", (5,))]), Emitted([Emission("a", finish=Finish("stop"))]))
    assert not between.process.answers
    assert not between.api.drain()
    assert not between.scheduler.drain()


def test_answers_go_before_prompts_that_wait(between: Between) -> None:
    between.tell(request("running"))
    between.process.turn()
    between.heard_by(between.scheduler, 1)
    between.tell(request("x"), request("y"), Emitted([Emission("running", (5,))]))
    between.heard_by(between.api, 1)
    between.process.turn()
    assert [admitted.rid for admitted in between.heard_by(between.scheduler, 1)] == ["x"], "one prompt a turn"
    between.process.turn()
    assert [admitted.rid for admitted in between.heard_by(between.scheduler, 1)] == ["y"]


def test_a_prompt_of_ids_reaches_the_scheduler_as_it_is(between: Between) -> None:
    between.tell(Generate("a", TokenPrompt(pack_ids([7, 8])), SamplingParams(max_new_tokens=3), received_ns=99))
    between.process.turn()
    [admitted] = between.heard_by(between.scheduler, 1)
    assert (admitted.token_ids, admitted.stop.max_new_tokens, admitted.received_ns) == (pack_ids([7, 8]), 3, 99)


def test_arguments_nested_too_deeply_refuse_one_request_and_the_process_goes_on(between: Between) -> None:
    arguments = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    between.tell(chat("deep", {"role": "assistant", "content": None, "tool_calls": [call]}), request("next"))
    between.process.turn()
    between.process.turn()
    [failed] = between.heard_by(between.api, 1)
    assert (failed.rid, failed.code) == ("deep", ErrorCode.INVALID_REQUEST)
    assert failed.param == "messages[0].tool_calls[0].function.arguments"
    assert [admitted.rid for admitted in between.heard_by(between.scheduler, 1)] == ["next"]


def test_a_bug_in_tokenizing_one_prompt_ends_that_request_with_an_incident_that_the_log_has(
    between: Between, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(text: str, *, add_special_tokens: bool) -> list[int]:
        raise ZeroDivisionError(text)

    monkeypatch.setattr(between.process.vocabulary, "encode", broken)
    between.tell(request("a"))
    between.process.turn()
    [failed] = between.heard_by(between.api, 1)
    assert (failed.rid, failed.code) == ("a", ErrorCode.INTERNAL)
    assert failed.text.rsplit(" ", 1)[1] in caplog.text
