"""Image processes: real ones, with good files, bad files and files that kill or stall them."""

from __future__ import annotations

import base64
import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from srt.errors import ErrorCode
from srt.tiles import TileFiles
from srt.tokenizer.image_jobs import ImageLimits, Job, Made, Outcome, Refused, Setup
from srt.tokenizer.image_pool import ImagePool
from srt.tokenizer.images import make_views
from srt.tokenizer.media import Fetcher
from tests.support.pictures import ROOMY, STEP, file_of, picture
from tests.support.site import HOSTS, Site, names, redirect, send_body

LIMITS = ImageLimits(bytes=8 << 20, pixels=1 << 26, tokens=262_144)
Outcomes = dict[int, Outcome]


class Slot:
    """Puts outcomes into a queue."""

    def __init__(self, delivered: queue.Queue[tuple[int, Outcome]]) -> None:
        self._delivered = delivered

    def deliver(self, number: int, outcome: Outcome) -> None:
        self._delivered.put((number, outcome))

    def close(self) -> None:
        pass


class Pool:
    """A pool and the outcomes it delivered."""

    def __init__(self, rundir: Path, size: int, seconds: float, fetcher: Fetcher | None = None) -> None:
        self.files = TileFiles(rundir, STEP)
        self.files.make()
        self._others = set(psutil.Process(os.getpid()).children())  # of earlier tests: libraries keep helpers of theirs
        self._delivered: queue.Queue[tuple[int, Outcome]] = queue.Queue()
        setup = Setup(STEP, LIMITS, "vendor", str(rundir), seconds)
        fetcher = fetcher or Fetcher([], LIMITS.bytes, seconds)
        self.pool = ImagePool(setup, size, fetcher, lambda: Slot(self._delivered))

    def process(self) -> psutil.Process:
        """The one process of this pool."""
        (child,) = set(psutil.Process(os.getpid()).children()) - self._others
        return child

    def wait(self, count: int) -> Outcomes:
        return dict(self._delivered.get(timeout=60) for _ in range(count))

    def do(self, data: bytes, *, encoded: bool = False, crops: bool = True) -> Outcome:
        self.pool.submit(0, Job(data, encoded, crops))
        return self.wait(1)[0]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path, 1, 30.0)
    yield made
    made.pool.close()


def test_tiles_in_the_file_are_the_views_of_the_image(pool: Pool) -> None:
    data = file_of(picture(800, 300))
    outcome = pool.do(data)
    assert isinstance(outcome, Made)
    assert (outcome.columns, outcome.rows) == (2, 1)
    expected = make_views(data, STEP, ROOMY, "vendor")
    crops, view = pool.files.read(outcome.key, 2)
    assert crops == expected.crops.tobytes()
    assert view == expected.view.tobytes()
    assert outcome.key == expected.key()


def test_base64_is_decoded_in_the_image_process(pool: Pool) -> None:
    data = file_of(picture(64, 64))
    encoded = base64.encodebytes(data)
    assert b"\n" in encoded
    assert pool.do(encoded, encoded=True) == pool.do(data)


@pytest.mark.parametrize("text", [b"iVBORw0KGgo", b"not base64!", b"====", "höh".encode(), b"ab-_"])
def test_wrong_base64_is_refused(pool: Pool, text: bytes) -> None:
    outcome = pool.do(text, encoded=True)
    assert isinstance(outcome, Refused)
    assert "neither a data URI, nor a URL, nor base64" in outcome.text


def test_a_base64_text_beyond_the_limit_is_refused_before_it_is_decoded(pool: Pool) -> None:
    outcome = pool.do(b"A" * (50 << 20), encoded=True)
    assert isinstance(outcome, Refused)
    assert outcome.text == "the image has about 39321600 bytes, the limit is 8388608 (--max-image-bytes)"


def test_without_crops_only_the_global_view_is_made(pool: Pool) -> None:
    outcome = pool.do(file_of(picture(1024, 768)), crops=False)
    assert isinstance(outcome, Made)
    assert (outcome.columns, outcome.rows) == (0, 0)
    crops, view = pool.files.read(outcome.key, 0)
    assert (len(crops), len(view)) == (0, 3 * 728 * 728)


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_is_served(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 1, seconds=0.15)
    try:
        outcome = pool.do(file_of(Image.new("RGB", (8000, 8000)), "JPEG"))
        assert outcome == Refused(
            ErrorCode.INVALID_REQUEST, "the image could not be decoded within 0.15 s (--max-image-seconds)"
        )
        for _ in range(20):
            outcome = pool.do(file_of(picture(20, 20)), crops=False)
            if isinstance(outcome, Made):
                break
        assert isinstance(outcome, Made)
    finally:
        pool.pool.close()


def test_an_image_process_that_dies_takes_one_image_with_it(pool: Pool) -> None:
    data = file_of(picture(64, 64))
    assert isinstance(pool.do(data), Made)
    child = pool.process()
    child.kill()
    child.wait(5)
    outcome = pool.do(data)
    assert outcome == Refused(ErrorCode.INVALID_REQUEST, "the image made its decoder fail")
    assert isinstance(pool.do(data), Made)


def test_memory_of_an_image_process_stays_flat_under_attack(pool: Pool) -> None:
    from tests.tokenizer.test_images import png

    attacks = [png(60_000, 60_000, b"\0" * 100_000), png(100_000, 30, b""), png(60_000, 10, b""), b"\0" * (8 << 20),
               file_of(picture(900, 900))[:200_000]]  # fmt: skip
    assert isinstance(pool.do(file_of(picture(64, 64))), Made)
    child = pool.process()
    for attack in attacks:
        assert isinstance(pool.do(attack), Refused)
    before = child.memory_info().rss
    for _ in range(5):
        for attack in attacks:
            assert isinstance(pool.do(attack), Refused)
    assert child.is_running()
    assert child.memory_info().rss < before + (32 << 20)


def test_a_fetched_image_is_made_like_one_in_the_request(tmp_path: Path, site: Site) -> None:
    data = file_of(picture(300, 200))
    site.answers = {"/a.png": lambda handler: send_body(handler, data), "/b.png": redirect("http://127.0.0.1/")}
    fetcher = Fetcher(["img.example.com"], LIMITS.bytes, 5.0, names(HOSTS), site.connect)
    pool = Pool(tmp_path, 1, 30.0, fetcher)
    try:
        pool.pool.fetch(1, "http://img.example.com/a.png", crops=True)
        pool.pool.fetch(2, "http://img.example.com/b.png", crops=True)
        pool.pool.submit(3, Job(data, base64=False, crops=True))
        outcomes = pool.wait(3)
    finally:
        pool.pool.close()
    assert outcomes[1] == outcomes[3]
    refused = outcomes[2]
    assert isinstance(refused, Refused)
    assert "'127.0.0.1' are not fetched" in refused.text


def test_a_pool_leaves_no_process_behind(tmp_path: Path) -> None:
    before = len(psutil.Process(os.getpid()).children())
    pool = Pool(tmp_path, 2, 30.0)
    for number in range(6):
        pool.pool.submit(number, Job(file_of(picture(60 + number, 60)), False, True))
    outcomes = pool.wait(6)
    assert all(isinstance(outcome, Made) for outcome in outcomes.values())
    assert len({outcome.key for outcome in outcomes.values() if isinstance(outcome, Made)}) == 6
    pool.pool.close()
    deadline = time.monotonic() + 5
    while len(psutil.Process(os.getpid()).children()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(psutil.Process(os.getpid()).children()) == before
