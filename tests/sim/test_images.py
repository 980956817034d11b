"""Images in the scheduler: keyed by content, named to the worker where they are wanted, released when they are not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from srt.messages import Finish, ImageSpan
from srt.scheduler.image_keys import keyed_ids, plain_ids
from tests.sim.fake_worker import answer, as_seen
from tests.sim.world import Client, World
from tests.support.plans import runtime_plan

PLACEHOLDER = 47
SIZE = 10
WINDOW = 8


def span(key: str, start: int, *, tokens: int = SIZE, columns: int = 0, rows: int = 0) -> ImageSpan:
    return ImageSpan(key.encode().ljust(32), start, tokens, columns, rows)


class Prompt:
    """Token ids with images: a text is one token a letter, an image a key in angle brackets."""

    def __init__(self, text: str) -> None:
        self.tokens: list[int] = []
        self.images: list[ImageSpan] = []
        key = ""
        for letter in text:
            if letter == ">":
                self.images.append(span(key[1:], len(self.tokens)))
                self.tokens += [PLACEHOLDER] * SIZE
                key = ""
            elif key or letter == "<":
                key += letter
            else:
                self.tokens.append(ord(letter) % 40)


def send(world: World, text: str, count: int = 4, namespace: str = "") -> Client:
    prompt = Prompt(text)
    return world.send(prompt.tokens, count, namespace=namespace, images=prompt.images)


def expected(text: str, count: int, window: int = WINDOW) -> list[int]:
    prompt = Prompt(text)
    return answer(as_seen(prompt.tokens, prompt.images), count, window)


@pytest.fixture(params=[1, 4])
def world(request: pytest.FixtureRequest) -> World:
    made = World(runtime_plan(page_size=request.param, window=WINDOW, full_pages=200, sliding_pages=200))
    made.keep_steps = True
    return made


def ask(world: World, text: str, namespace: str = "") -> int:
    """Serve a prompt alone; returns how many of its tokens the cache had."""
    client = send(world, text, namespace=namespace)
    world.run()
    assert client.output == expected(text, 4)
    return client.cached_tokens


def test_the_same_image_hits_and_another_one_of_the_same_size_does_not(world: World) -> None:
    assert ask(world, "abcd<cat>efgh") == 0
    assert ask(world, "abcd<cat>efghi") >= 16
    assert ask(world, "abcd<dog>efgh") == 4
    assert ask(world, "abcd<dog>efgh<cat>i") >= 16


def test_an_image_hits_in_the_next_turn_of_a_conversation(world: World) -> None:
    prompt = Prompt("abcd<cat>efgh")
    first = send(world, "abcd<cat>efgh", 8)
    world.run()
    tokens = [*prompt.tokens, *first.output, 5, 6]
    second = world.send(tokens, 4, images=prompt.images)
    world.run()
    assert second.output == answer(as_seen(tokens, prompt.images), 4, WINDOW)
    assert second.cached_tokens >= 20


def test_namespaces_do_not_share_images(world: World) -> None:
    ask(world, "abcd<cat>efgh", "one")
    assert ask(world, "abcd<cat>efgh", "two") == 0
    assert ask(world, "abcd<cat>efgh", "one") > 0


def test_the_worker_is_told_true_ids_and_only_images_beyond_the_hit(world: World) -> None:
    ask(world, "abcd<cat>efgh<dog>ijkl")
    assert ask(world, "abcd<cat>efgh<fox>ijkl") >= 16
    prompt = Prompt("abcd<cat>efgh<fox>ijkl")
    start = world.steps[-1].starts or next(step.starts for step in reversed(world.steps) if step.starts)
    assert start[0].token_ids == b"".join(token.to_bytes(4, "little") for token in prompt.tokens)
    assert start[0].images == (prompt.images[1],)


def test_images_are_released_when_the_last_step_that_names_them_has_settled(world: World) -> None:
    client = send(world, "ab<cat>cd", 20)
    world.turn()
    world.abort(client)
    assert client.ending == Finish("abort")
    assert world.released == [] and world.results
    while world.results:
        world.deliver()
    assert world.released == [client.rid]


def test_images_of_a_request_that_ends_in_the_queue_are_released_at_once() -> None:
    world = World(runtime_plan(rows=1))
    send(world, "abcdefgh", 30)
    waiting = send(world, "<cat>a", 3)
    world.abort(waiting)
    assert world.released == [waiting.rid]


def test_keys_differ_at_every_position_and_never_equal_a_token() -> None:
    ids = bytes(4 * 50)
    images = [span("cat", 5), span("dog", 20)]
    keyed = keyed_ids(ids, images)
    other = keyed_ids(ids, [span("cow", 5), span("dog", 20)])

    def at(packed: Sequence[int], position: int) -> int:
        return int.from_bytes(bytes(packed[4 * position : 4 * position + 4]), "little", signed=True)

    for position in range(50):
        inside = 5 <= position < 15 or 20 <= position < 30
        assert (at(keyed, position) < 0) == inside
        assert (at(keyed, position) != at(other, position)) == (5 <= position < 15)
    assert len({at(keyed, position) for position in range(5, 15)}) == 10
    assert plain_ids(bytes(keyed) + b"more", ids) == ids + b"more"


@pytest.mark.parametrize("seed", range(24))
def test_every_answer_is_right_under_random_traffic_of_images(seed: int) -> None:
    """Retractions, cancels, shared prefixes, equal and different images; pools that run out."""
    rng = random.Random(seed)
    window = rng.choice((3, 8, 20))
    world = World(
        runtime_plan(
            page_size=rng.choice((1, 4, 16)), window=window, full_pages=rng.choice((20, 40, 120)),
            sliding_pages=rng.choice((30, 120)), rows=4, chunk=rng.choice((3, 16)), context=80,
            overlap=rng.random() < 0.5,
        )
    )  # fmt: skip
    sent: list[tuple[Client, str]] = []
    for _ in range(60):
        text = "".join(rng.choice(("a", "b", "cd", "<cat>", "<dog>")) for _ in range(rng.randrange(1, 6)))
        prompt = Prompt(text)
        if len(prompt.tokens) > 60:
            continue
        world.scheduler.state.share = 0.0  # expect no answers, so that pages run out
        sent.append((send(world, text, rng.randrange(1, 16), rng.choice(("", "", "salt"))), text))
        for _ in range(rng.randrange(3)):
            world.deliver()
        live = [client for client, _ in sent if client.ending is None]
        if live and rng.random() < 0.15:
            world.abort(rng.choice(live))
    world.run()
    for client, text in sent:
        if client.ending == Finish("length"):
            assert client.output == expected(text, client.max_new_tokens, window)
    with_images = {client.rid for client, text in sent if "<" in text and isinstance(client.ending, Finish)}
    assert sorted(world.released) == sorted(with_images)
    world.scheduler.state.cache.check()
