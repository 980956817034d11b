"""Many constrained requests at once: every finished answer fits, and nobody waits for anybody's grammar."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.support.schemas import with_roots
from tests.support.server import Answer, Server

PROMPT = "<|im_start|>user\nTell me.<|im_end|>\n<|im_start|>assistant\n"
HUGE = "|".join(f"[a-z]{{{count}}}x" for count in range(3000))
"""Half a minute and more to compile."""
AMBIGUOUS = "root ::= x\nx ::= [a-z ] | x x | x x x"
STALL_S = 2.0
"""A machine that runs other things at the same time may hold a stream up for some of it; a compiler would for more."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The built-in model with MTP, a short time for compiling and a small pool of KV pages."""
    options = ("--max-grammar-seconds", "1", "--speculative-algorithm", "mtp", "--max-total-tokens", "2048")
    with Server(*options) as running:
        yield running


def ask(server: Server, schemas: list[dict[str, Any]], new_tokens: int = 256) -> list[dict[str, Any]]:
    """An answer to each schema, all asked at once."""
    params = [
        {"json_schema": schema, "temperature": 1, "sampling_seed": index, "max_new_tokens": new_tokens}
        for index, schema in enumerate(schemas)
    ]
    answer = server.post("/generate", {"text": [PROMPT] * len(schemas), "sampling_params": params})
    assert answer.status == 200, answer.text
    found: list[dict[str, Any]] = answer.json
    return found


def check(server: Server, schemas: list[dict[str, Any]]) -> None:
    """Every finished answer fits its schema, and most are finished."""
    finished = 0
    for schema, answer in zip(schemas, ask(server, schemas), strict=True):
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            finished += 1
            jsonschema.validate(json.loads(answer["text"]), schema, jsonschema.Draft202012Validator)
    assert finished > 0.6 * len(schemas)


def test_every_finished_answer_fits_its_schema(server: Server) -> None:
    check(server, with_roots(40, seed=3))


@pytest.mark.suite
@pytest.mark.timeout(1200)
def test_every_finished_answer_to_400_schemas_fits(server: Server) -> None:
    for seed in range(10):
        check(server, with_roots(40, seed=100 + seed))


def test_retracted_requests_go_on_in_their_grammar(server: Server) -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 20, "maxItems": 20}
    before = server.metric("num_retracted_requests_total")
    together = ask(server, [schema] * 12, 500)
    assert server.metric("num_retracted_requests_total") > before, "the pool was too large to force a retraction"
    for index, answer in enumerate(together):
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            jsonschema.validate(json.loads(answer["text"]), schema)
        if answer["meta_info"]["num_retractions"] and index < 4:
            params = {"json_schema": schema, "temperature": 1, "sampling_seed": index, "max_new_tokens": 500}
            alone = server.post("/generate", {"text": PROMPT, "sampling_params": params}).json
            assert alone["output_ids"] == answer["output_ids"]


class Neighbour(threading.Thread):
    """Streams answers one after the other and remembers the longest pause within one."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.done = threading.Event()
        self.tokens = 0
        self.pause_s = 0.0

    def run(self) -> None:
        """Until `done`."""
        params = {"max_new_tokens": 200, "temperature": 1, "ignore_eos": True}
        body = json.dumps({"text": PROMPT, "sampling_params": params, "stream": True}).encode()
        asked = urllib.request.Request(
            f"{self.server.url}/generate", data=body, headers={"Content-Type": "application/json"}
        )
        while not self.done.is_set():
            last = None
            with urllib.request.urlopen(asked, timeout=60) as events:
                for _ in events:
                    now = time.monotonic()
                    if last is not None:
                        self.tokens += 1
                        self.pause_s = max(self.pause_s, now - last)
                    last = now


def test_evil_constraints_are_refused_and_stall_nobody(server: Server) -> None:
    server.post("/generate", {"text": PROMPT, "sampling_params": {"regex": "a", "max_new_tokens": 4}})
    neighbour = Neighbour(server)
    neighbour.start()
    answers: list[Answer] = []

    def evil(**constraint: Any) -> None:
        params = {"max_new_tokens": 500, "ignore_eos": True, "temperature": 1, **constraint}
        answers.append(server.post("/generate", {"text": PROMPT, "sampling_params": params}))

    wanted = [
        {"regex": HUGE}, {"regex": HUGE + "|1"}, {"ebnf": AMBIGUOUS}, {"json_schema": "[" * 100_000},
        {"json_schema": json.dumps({"enum": ["x" * 300_000]})},
    ]  # fmt: skip
    threads = [threading.Thread(target=evil, kwargs=constraint) for constraint in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    neighbour.done.set()
    neighbour.join(60)
    assert [answer.status for answer in answers] == [400] * len(wanted), [answer.text[:200] for answer in answers]
    said = " ".join(answer.text for answer in answers)
    for reason in ("it takes more than 1 s", "ms a token", "nested", "the limit is 262144"):
        assert reason in said, said
    assert neighbour.tokens > 100
    assert neighbour.pause_s < STALL_S


def test_cancelling_while_a_grammar_is_compiled_ends_the_request_at_once(server: Server) -> None:
    answers: list[Answer] = []
    body = {"text": PROMPT, "rid": "slow", "sampling_params": {"regex": HUGE + "|2"}}
    thread = threading.Thread(target=lambda: answers.append(server.post("/generate", body)))
    thread.start()
    time.sleep(0.5)
    server.post("/abort_request", {"rid": "slow"})
    thread.join(2.5)
    assert not thread.is_alive()
    assert answers[0].json["meta_info"]["finish_reason"]["type"] == "abort"
