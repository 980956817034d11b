"""Images of requests from their arrival to the last step that may look at them.

    begin ─▶ in line ─▶ being made ─▶ ready: the request goes on, its images are held ─▶ release
                           └─▶ failed: the request ends

Requests are begun in the order they come, while the images that are held fit the budget and few are being made. One
that has begun is always finished, so two that wait for room can never wait for each other; beyond the budget there
are at most the images of one request and those that were being made.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from srt.errors import ErrorCode, ServingError
from srt.messages import ImageMade, ImageRefused, ImageSource
from srt.tokenizer.image_jobs import Job
from srt.tokenizer.image_prompt import Picture
from srt.tokenizer.media import Inline, Remote, parse_source
from srt.tokenizer.tile_store import TileStore

Owner = str | int
"""Who wants images: the id of a request, or the number of a call."""

TILE_BYTES: Final = 1 << 30
"""Tiles on disk. Beyond it, images that nobody needs go, and requests with new ones wait."""


class Maker(Protocol):
    """Makes images in the background and answers by number."""

    def submit(self, number: int, job: Job) -> None:
        """Decode and cut an image file."""
        ...

    def fetch(self, number: int, url: str, *, crops: bool) -> None:
        """Fetch an image file, then do the same."""
        ...

    def allow(self, url: str) -> None:
        """Raises: ServingError if a URL is not one to fetch from."""
        ...


@dataclass(frozen=True)
class _Source:
    """An image as it is wanted."""

    origin: Inline | Remote
    crops: bool

    def digest(self) -> bytes | None:
        """A name for what will be made of it; None for a URL, behind which things change."""
        match self.origin:
            case Inline(base64=text):
                return hashlib.sha256(b"%d" % self.crops + text.encode()).digest()
            case Remote():
                return None


@dataclass
class _Making:
    """A job, and which images of which owners wait for it."""

    source: _Source
    digest: bytes | None
    waiters: list[tuple[Owner, int]]


@dataclass
class _Order:
    """An owner's images; None where one is still being made."""

    pictures: list[Picture | None]
    missing: int


class Gallery:
    """All images of all requests. What has become of them is in `ready` and `failed`, for the caller to take."""

    def __init__(self, maker: Maker, store: TileStore, *, images_max: int, jobs_max: int) -> None:
        self._maker = maker
        self._store = store
        self._images_max = images_max
        self._jobs_max = jobs_max
        self._numbers = itertools.count()
        self._line: dict[Owner, list[_Source]] = {}
        self._orders: dict[Owner, _Order] = {}
        self._held: dict[Owner, list[bytes]] = {}
        self._making: dict[int, _Making] = {}
        self._by_digest: dict[bytes, int] = {}
        self.ready: list[tuple[Owner, tuple[Picture, ...]]] = []
        self.failed: list[tuple[Owner, ServingError]] = []

    def begin(self, owner: Owner, images: Sequence[ImageSource]) -> None:
        """Make these images.

        Raises: ServingError if there are too many, or one is given in a way that is not served.
        """
        if len(images) > self._images_max:
            raise ServingError(
                ErrorCode.INVALID_REQUEST,
                f"the request has {len(images)} images, the limit is {self._images_max} (--max-images-per-request)",
                "image_url",
            )
        sources = []
        for index, image in enumerate(images):
            try:
                origin = parse_source(image.text)
                if isinstance(origin, Remote):
                    self._maker.allow(origin.url)
            except ServingError as error:
                raise _numbered(error, index, len(images)) from error
            sources.append(_Source(origin, crops=image.detail != "low"))
        self._line[owner] = sources
        self._start_next()

    def cancel(self, owner: Owner) -> bool:
        """Forget an owner whose images are not ready yet; False if there is no such."""
        if self._line.pop(owner, None) is not None:
            return True
        order = self._orders.pop(owner, None)
        if order is None:
            return False
        self._let_go(order)
        return True

    def release(self, owner: Owner) -> None:
        """An owner's images, if it holds any, are not needed any more."""
        for key in self._held.pop(owner, ()):
            self._store.release(key)
        self._store.trim()
        self._start_next()

    def made(self, news: ImageMade) -> None:
        """An image is made."""
        picture = Picture(news.key, news.columns, news.rows)
        making = self._making[news.job]
        if not self._store.add(picture, making.digest):
            self._submit(news.job, making.source)
            return
        self._forget(news.job)
        for owner, index in making.waiters:
            order = self._orders.get(owner)
            if order is not None:
                self._fill(order, index, picture)
                self._finish(owner, order)
        self._store.trim()
        self._start_next()

    def refused(self, news: ImageRefused) -> None:
        """An image cannot be made: whoever waits for it fails."""
        for owner, index in self._forget(news.job).waiters:
            order = self._orders.pop(owner, None)
            if order is not None:
                error = ServingError(news.code, news.text, "image_url")
                self.failed.append((owner, _numbered(error, index, len(order.pictures))))
                self._let_go(order)
        self._start_next()

    def _start_next(self) -> None:
        while self._line and len(self._making) < self._jobs_max:
            if self._store.full and (self._held or self._orders):
                return
            owner = next(iter(self._line))
            self._start(owner, self._line.pop(owner))

    def _start(self, owner: Owner, sources: list[_Source]) -> None:
        order = self._orders[owner] = _Order([None] * len(sources), len(sources))
        for index, source in enumerate(sources):
            digest = source.digest()
            picture = None if digest is None else self._store.find(digest)
            if picture is not None:
                self._fill(order, index, picture)
                continue
            number = None if digest is None else self._by_digest.get(digest)
            if number is not None:
                self._making[number].waiters.append((owner, index))
                continue
            number = next(self._numbers)
            self._making[number] = _Making(source, digest, [(owner, index)])
            if digest is not None:
                self._by_digest[digest] = number
            self._submit(number, source)
        self._finish(owner, order)

    def _submit(self, number: int, source: _Source) -> None:
        match source.origin:
            case Inline(base64=text):
                self._maker.submit(number, Job(text.encode(), base64=True, crops=source.crops))
            case Remote(url=url):
                self._maker.fetch(number, url, crops=source.crops)

    def _forget(self, number: int) -> _Making:
        making = self._making.pop(number)
        if making.digest is not None:
            del self._by_digest[making.digest]
        return making

    def _fill(self, order: _Order, index: int, picture: Picture) -> None:
        order.pictures[index] = picture
        order.missing -= 1
        self._store.hold(picture.key)

    def _finish(self, owner: Owner, order: _Order) -> None:
        if order.missing == 0:
            del self._orders[owner]
            pictures = tuple(picture for picture in order.pictures if picture is not None)
            self._held[owner] = [picture.key for picture in pictures]
            self.ready.append((owner, pictures))

    def _let_go(self, order: _Order) -> None:
        for picture in order.pictures:
            if picture is not None:
                self._store.release(picture.key)
        self._start_next()


def _numbered(error: ServingError, index: int, count: int) -> ServingError:
    """The error with the image that it is about, if there are several."""
    return error if count == 1 else ServingError(error.code, f"image {index + 1}: {error.text}", error.param)
