"""The built-in model behind a real server: the tasks of `server eval`, on prompts that training never showed."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from srt.builtin.tasks import FAMILIES
from srt.evaluation.ask import Answers, Questions, ask_all
from srt.evaluation.command import EVALUATED
from tests.support.checkpoints import write_checkpoint
from tests.support.gpu import DEVICES
from tests.support.server import Server

WANTED = 0.97
"""Least share of right answers of a family, in the long run."""
PROMPTS = 50
ANSWERABLE = tuple(name for name, kind in EVALUATED.items() if kind != "images")


def least_right(count: int, share: float = WANTED, risk: float = 1e-4) -> int:
    """Fewest right answers of `count` that a model with exactly `share` right still gets but for `risk`.

    The lower tail of the binomial distribution: of 50 answers 43, of 700 answers 660. A faulty runtime is far below:
    one wrong token spoils an answer.
    """
    tail = 0.0
    for right in range(count + 1):
        tail += math.comb(count, right) * share**right * (1 - share) ** (count - right)
        if tail > risk:
            return right
    raise AssertionError(count)


def ask(server: Server, *, seed: int, count: int = PROMPTS, concurrency: int = 16, stream: bool = False) -> Answers:
    """Put fresh problems of every family that needs no images, mixed, to a server."""
    questions = Questions(server.url, ANSWERABLE, count, concurrency, seed, stream)
    return asyncio.run(ask_all(questions, quiet=True))


def wrong_families(answers: Answers) -> dict[str, int]:
    """Families with too few right answers."""
    right = {name: sum(item.right for item in asked) for name, asked in answers.asked.items()}
    return {name: count for name, count in right.items() if count < least_right(PROMPTS)}


@pytest.fixture(scope="module", params=DEVICES)
def exact(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server on the built-in model in float32."""
    with Server("--model-path", "builtin:tiny", "--dtype", "float32", device=request.param) as running:
        yield running


@pytest.fixture
def blind(tmp_path: Path) -> Iterator[Server]:
    """A server whose checkpoint has no image tower."""
    with Server("--model-path", str(write_checkpoint(tmp_path / "text", "tiny", vision=False))) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server that was told nothing at all."""
    with Server(device=None) as running:
        yield running


@pytest.fixture(scope="module")
def in_batches(exact: Server) -> Answers:
    """Whole answers in float32, 16 at a time."""
    return ask(exact, seed=101)


def test_in_float32_each_family_is_answered_rightly(in_batches: Answers) -> None:
    assert wrong_families(in_batches) == {}
    right = sum(item.right for asked in in_batches.asked.values() for item in asked)
    assert right >= least_right(PROMPTS * len(ANSWERABLE))


def test_streams_carry_the_same_answers(exact: Server, in_batches: Answers) -> None:
    streamed = ask(exact, seed=101, count=15, concurrency=24, stream=True)
    for name, again in streamed.asked.items():
        asked = in_batches.asked[name][:15]
        assert [item.reply.message for item in again] == [item.reply.message for item in asked]
        assert [item.reply.tokens for item in again] == [item.reply.tokens for item in asked]


def test_without_any_option_the_built_in_model_answers_rightly(plain: Server) -> None:
    answers = ask(plain, seed=102)
    assert wrong_families(answers) == {}
    assert answers.server.model == "builtin:tiny"


def test_the_api_names_the_model_as_it_was_asked_for(plain: Server) -> None:
    info = plain.get("/model_info").json
    assert (info["model_path"], info["served_model_name"]) == ("builtin:tiny", "builtin:tiny")
    assert [card["id"] for card in plain.get("/v1/models").json["data"]] == ["builtin:tiny"]
    assert "builtin:tiny is served at" in plain.log


def evaluate(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `server eval` to its end."""
    return subprocess.run([sys.executable, "-m", "srt.cli", "eval", *words], capture_output=True, text=True, timeout=60)


def test_the_command_prints_a_row_a_family(plain: Server) -> None:
    done = evaluate("--url", plain.url, "--families", "sum", "tools", "images", "--count", "3", "--threshold", "0.6")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    images = [name for name, family in FAMILIES.items() if family.kind == "images" and family.evaluated]
    assert [row[0] for row in rows[:9]] == ["family", "sum", "tool_call", "tool_joined", "tool_answer", *images, "all"]


def test_the_command_asks_nothing_of_a_server_that_cannot_see(blind: Server) -> None:
    done = evaluate("--url", blind.url, "--families", "images")
    assert done.returncode == 1
    assert done.stderr.startswith("server: error: not asked: image_object")
