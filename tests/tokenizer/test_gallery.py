"""Images of requests: made once, held while needed, in order and within the budget, under every cancel."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from srt.errors import ErrorCode, ServingError
from srt.messages import ImageMade, ImageRefused, ImageSource
from srt.tiles import TileFiles
from srt.tokenizer.gallery import Gallery
from srt.tokenizer.image_jobs import Job
from srt.tokenizer.image_prompt import Picture
from srt.tokenizer.media import Fetcher
from srt.tokenizer.tile_store import TileStore
from tests.support.pictures import STEP

TILES = 3 * 728 * 728
"""Bytes of an image without crops."""


class Maker:
    """Takes jobs and makes them when it is told: an image's key is its text."""

    def __init__(self, files: TileFiles) -> None:
        self.files = files
        self.jobs: dict[int, Job] = {}
        self.urls: dict[int, str] = {}
        self.made: Counter[bytes] = Counter()
        self._fetcher = Fetcher(["example.com"], 100, 1.0)

    def submit(self, number: int, job: Job) -> None:
        self.jobs[number] = job

    def fetch(self, number: int, url: str, *, crops: bool) -> None:
        self.urls[number] = url

    def allow(self, url: str) -> None:
        self._fetcher.allow(url)

    def finish(self, number: int) -> ImageMade:
        data = self.jobs.pop(number).data if number in self.jobs else self.urls.pop(number).encode()
        key = data.ljust(32, b"_")
        self.files.write(key, [memoryview(bytes(TILES))], "test")
        self.made[data] += 1
        return ImageMade(number, key, 0, 0)


class Hall:
    """A gallery with its maker and files."""

    def __init__(self, rundir: Path, budget_images: float = 100, jobs: int = 100) -> None:
        files = TileFiles(rundir, STEP)
        files.make()
        self.directory = rundir / "tiles"
        self.maker = Maker(files)
        self.store = TileStore(files, int(budget_images * TILES))
        self.gallery = Gallery(self.maker, self.store, images_max=8, jobs_max=jobs)

    def begin(self, owner: str | int, *texts: str, detail: str = "auto") -> None:
        self.gallery.begin(owner, [ImageSource(text, "low" if detail == "low" else "auto") for text in texts])

    def finish_all(self) -> None:
        for number in [*self.maker.jobs, *self.maker.urls]:
            self.gallery.made(self.maker.finish(number))

    def ready(self) -> list[str | int]:
        owners = [owner for owner, _ in self.gallery.ready]
        self.gallery.ready.clear()
        return owners

    def files(self) -> int:
        return len(list(self.directory.iterdir()))


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    return Hall(tmp_path)


def pictures(hall: Hall) -> Sequence[Picture]:
    (_, found) = hall.gallery.ready.pop()
    return found


def test_a_request_is_ready_when_all_its_images_are_in_their_order(hall: Hall) -> None:
    hall.begin("r", "one", "two", "three")
    for number in (2, 0):
        hall.gallery.made(hall.maker.finish(number))
    assert hall.ready() == []
    hall.gallery.made(hall.maker.finish(1))
    assert [picture.key.rstrip(b"_") for picture in pictures(hall)] == [b"one", b"two", b"three"]


def test_an_image_is_made_once_for_all_who_want_it_at_the_same_time_or_later(hall: Hall) -> None:
    hall.begin("a", "one", "one")
    hall.begin("b", "one")
    hall.finish_all()
    assert hall.ready() == ["a", "b"]
    hall.begin("c", "one")
    assert hall.ready() == ["c"]
    assert hall.maker.made == {b"one": 1}


def test_low_detail_is_another_image(hall: Hall) -> None:
    hall.begin("a", "one")
    hall.begin("b", "one", detail="low")
    assert [job.crops for job in hall.maker.jobs.values()] == [True, False]


def test_what_is_behind_a_url_is_fetched_each_time(hall: Hall) -> None:
    for owner in ("a", "b"):
        hall.begin(owner, "http://example.com/x.png")
    assert len(hall.maker.urls) == 2
    hall.finish_all()
    assert hall.ready() == ["a", "b"]


def test_a_refused_image_ends_everyone_who_waits_for_it_and_nobody_else(hall: Hall) -> None:
    hall.begin("a", "good", "bad")
    hall.begin("b", "bad")
    hall.begin("c", "good")
    del hall.maker.jobs[1]
    hall.gallery.refused(ImageRefused(1, ErrorCode.INVALID_REQUEST, "it is broken"))
    failed = {owner: error.text for owner, error in hall.gallery.failed}
    assert failed == {"a": "image 2: it is broken", "b": "it is broken"}
    hall.finish_all()
    assert hall.ready() == ["c"]


def test_too_many_images_and_unlisted_hosts_are_refused_at_once(hall: Hall) -> None:
    with pytest.raises(ServingError, match="the request has 9 images, the limit is 8"):
        hall.begin("a", *["x"] * 9)
    with pytest.raises(ServingError, match=r"image 2: images from 'evil\.com' are not fetched"):
        hall.begin("a", "x", "http://evil.com/")
    assert not hall.maker.jobs


def test_beyond_the_budget_requests_wait_for_room_in_their_order(tmp_path: Path) -> None:
    hall = Hall(tmp_path, budget_images=2, jobs=1)
    for owner in "abcd":
        hall.begin(owner, owner, owner + "2")
        hall.finish_all()
    assert hall.ready() == ["a"]
    hall.gallery.release("a")
    hall.finish_all()
    assert hall.ready() == ["b"]
    assert hall.gallery.cancel("c")
    hall.gallery.release("b")
    hall.finish_all()
    assert hall.ready() == ["d"]
    assert hall.files() <= 4


def test_a_request_larger_than_the_budget_runs_alone(tmp_path: Path) -> None:
    hall = Hall(tmp_path, budget_images=1.5, jobs=2)
    hall.begin("a", "1", "2", "3", "4")
    hall.begin("b", "1")
    hall.finish_all()
    assert hall.ready() == ["a"]
    hall.gallery.release("a")
    hall.finish_all()
    assert hall.ready() == ["b"]


def test_images_that_nobody_holds_go_when_the_budget_asks_for_it_the_oldest_first(tmp_path: Path) -> None:
    hall = Hall(tmp_path, budget_images=3)
    for owner in "abc":
        hall.begin(owner, owner)
        hall.finish_all()
        hall.gallery.release(owner)
    assert hall.files() == 3
    hall.begin("a2", "a")
    hall.gallery.release("a2")
    hall.begin("d", "d")
    hall.finish_all()
    hall.gallery.release("d")
    assert hall.files() == 3
    hall.begin("e", "a", "c", "d", "b")
    assert list(hall.maker.jobs.values()) == [Job(b"b", base64=True, crops=True)]


def test_tiles_that_were_deleted_while_an_equal_image_was_made_are_made_again(tmp_path: Path) -> None:
    hall = Hall(tmp_path, budget_images=1)
    hall.begin("a", "one")
    made = hall.maker.finish(0)
    hall.maker.files.delete(made.key)
    hall.maker.jobs.clear()
    hall.gallery.made(made)
    assert hall.ready() == []
    assert list(hall.maker.jobs) == [0]
    hall.finish_all()
    assert hall.ready() == ["a"]


def test_a_cancelled_request_leaves_nothing_held(hall: Hall) -> None:
    hall.begin("a", "one", "two")
    hall.gallery.made(hall.maker.finish(0))
    assert hall.gallery.cancel("a")
    assert not hall.gallery.cancel("a")
    hall.finish_all()
    assert hall.ready() == []
    assert hall.store.held_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_under_random_traffic_every_request_ends_and_holds_are_exact(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    hall = Hall(tmp_path, budget_images=rng.choice((1, 2, 5)), jobs=rng.choice((1, 3, 50)))
    alive: set[str] = set()
    holding: set[str] = set()
    ended: Counter[str] = Counter()
    for number in range(120):
        match rng.choice(("begin", "make", "make", "refuse", "cancel", "release")):
            case "begin":
                owner = f"r{number}"
                hall.begin(owner, *(rng.choice("vwxyz") for _ in range(rng.randrange(1, 5))))
                alive.add(owner)
            case "make" if hall.maker.jobs:
                hall.gallery.made(hall.maker.finish(rng.choice(list(hall.maker.jobs))))
            case "refuse" if hall.maker.jobs and rng.random() < 0.3:
                job = rng.choice(list(hall.maker.jobs))
                del hall.maker.jobs[job]
                hall.gallery.refused(ImageRefused(job, ErrorCode.INVALID_REQUEST, "no"))
            case "cancel" if alive:
                owner = rng.choice(sorted(alive))
                if hall.gallery.cancel(owner):
                    alive.remove(owner)
            case "release" if holding:
                owner = rng.choice(sorted(holding))
                holding.remove(owner)
                hall.gallery.release(owner)
            case _:
                pass
        take(hall, alive, holding, ended)
    while alive or holding:
        hall.finish_all()
        take(hall, alive, holding, ended)
        for owner in list(holding):
            holding.remove(owner)
            hall.gallery.release(owner)
        take(hall, alive, holding, ended)
    assert set(ended.values()) <= {1}
    assert hall.store.held_bytes == 0
    assert hall.store.total_bytes == TILES * len({path.name for path in hall.directory.iterdir()})


def take(hall: Hall, alive: set[str], holding: set[str], ended: Counter[str]) -> None:
    for owner, _ in hall.gallery.ready:
        assert isinstance(owner, str)
        alive.remove(owner)
        holding.add(owner)
        ended[owner] += 1
    for owner, _ in hall.gallery.failed:
        assert isinstance(owner, str)
        alive.remove(owner)
        ended[owner] += 1
    hall.gallery.ready.clear()
    hall.gallery.failed.clear()
