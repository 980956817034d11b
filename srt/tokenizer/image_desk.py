"""The tokenizer's dealings with images, as one object: for a model that takes images, and for one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, assert_never

import zmq

from srt.configs.plan import ImageConfig, RuntimePlan
from srt.errors import ErrorCode, ServingError
from srt.messages import ImageMade, ImageRefused, ImageSource, ImageSpan
from srt.tiles import TileFiles
from srt.tokenizer.gallery import TILE_BYTES, Gallery, Owner
from srt.tokenizer.image_jobs import ImageLimits, Made, Outcome, Refused, Setup
from srt.tokenizer.image_pool import ImagePool
from srt.tokenizer.image_prompt import ImagePlacer, Picture
from srt.tokenizer.layout import Rule
from srt.tokenizer.media import Fetcher
from srt.tokenizer.tile_store import TileStore
from srt.tokenizer.vocabulary import Vocabulary
from srt.wire import Outbox

JOBS_A_PROCESS: Final = 4
"""Images that wait for an image process before the next request's are looked at."""

Ready = tuple[Owner, tuple[Picture, ...]]
Fault = tuple[Owner, ServingError]


class ImageDesk(Protocol):
    """Images from their arrival to the last step that may look at them. See `Gallery`."""

    placeholder: str
    """What stands for an image in a rendered chat."""

    def begin(self, owner: Owner, images: Sequence[ImageSource]) -> None:
        """Make these images. Raises: ServingError if they are not served."""
        ...

    def hear(self, news: ImageMade | ImageRefused) -> None:
        """What became of an image."""
        ...

    def take(self) -> tuple[list[Ready], list[Fault]]:
        """Owners whose images are ready, and those that have failed, since the last time."""
        ...

    def cancel(self, owner: Owner) -> bool:
        """Forget an owner whose images are not ready; False if there is no such."""
        ...

    def release(self, owner: Owner) -> None:
        """An owner's images, if it holds any, are not needed any more."""
        ...

    def place(self, packed: bytes, pictures: Sequence[Picture]) -> tuple[bytes, tuple[ImageSpan, ...]]:
        """A prompt with its images. Raises: ServingError if their numbers differ."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


class NoImages:
    """The desk of a model that reads text alone."""

    placeholder = ""

    def begin(self, owner: Owner, images: Sequence[ImageSource]) -> None:
        """Raises: ServingError, always."""
        raise ServingError(ErrorCode.INVALID_REQUEST, "this model takes no images", "image_url")

    def hear(self, news: ImageMade | ImageRefused) -> None:
        """Never called: no image is ever made."""
        raise AssertionError(news)

    def take(self) -> tuple[list[Ready], list[Fault]]:
        """Nothing."""
        return [], []

    def cancel(self, owner: Owner) -> bool:
        """Nobody is known."""
        return False

    def release(self, owner: Owner) -> None:
        """Nobody holds anything."""

    def place(self, packed: bytes, pictures: Sequence[Picture]) -> tuple[bytes, tuple[ImageSpan, ...]]:
        """The prompt as it is."""
        return packed, ()

    def close(self) -> None:
        """Nothing runs."""


class _Messenger:
    """Sends outcomes from a pool thread into the tokenizer's own inbox."""

    def __init__(self, context: zmq.Context[Any], rundir: Path) -> None:
        self._outbox = Outbox(context, rundir, "tokenizer")

    def deliver(self, number: int, outcome: Outcome) -> None:
        """Pass an outcome on."""
        match outcome:
            case Made(key, columns, rows):
                self._outbox.send(ImageMade(number, key, columns, rows))
            case Refused(code, text):
                self._outbox.send(ImageRefused(number, code, text))
            case _:
                assert_never(outcome)

    def close(self) -> None:
        """Close the socket."""
        self._outbox.close()


class VisionDesk:
    """The desk of a model that takes images.

    Raises: StartupError if the vocabulary lacks a token that images are written with.
    """

    def __init__(
        self, config: ImageConfig, plan: RuntimePlan, vocabulary: Vocabulary, rundir: Path, context: zmq.Context[Any]
    ) -> None:
        server = plan.server
        self._placer = ImagePlacer(config, vocabulary)
        self.placeholder = self._placer.placeholder
        rule: Rule = "hf" if server.image_preprocessing == "hf" else "vendor"
        limits = ImageLimits(server.max_image_bytes, server.max_image_pixels, plan.context_length)
        files = TileFiles(rundir, config)
        files.make()
        self._pool = ImagePool(
            Setup(config, limits, rule, str(rundir), server.max_image_seconds),
            plan.image_processes,
            Fetcher(server.media_domains, server.max_image_bytes, server.max_image_seconds),
            lambda: _Messenger(context, rundir),
        )
        self._gallery = Gallery(
            self._pool,
            TileStore(files, TILE_BYTES),
            images_max=server.max_images_per_request,
            jobs_max=JOBS_A_PROCESS * plan.image_processes,
        )

    def begin(self, owner: Owner, images: Sequence[ImageSource]) -> None:
        """Make these images. Raises: ServingError if they are not served."""
        self._gallery.begin(owner, images)

    def hear(self, news: ImageMade | ImageRefused) -> None:
        """What became of an image."""
        match news:
            case ImageMade():
                self._gallery.made(news)
            case ImageRefused():
                self._gallery.refused(news)
            case _:
                assert_never(news)

    def take(self) -> tuple[list[Ready], list[Fault]]:
        """Owners whose images are ready, and those that have failed, since the last time."""
        ready, failed = self._gallery.ready, self._gallery.failed
        self._gallery.ready, self._gallery.failed = [], []
        return ready, failed

    def cancel(self, owner: Owner) -> bool:
        """Forget an owner whose images are not ready; False if there is no such."""
        return self._gallery.cancel(owner)

    def release(self, owner: Owner) -> None:
        """An owner's images, if it holds any, are not needed any more."""
        self._gallery.release(owner)

    def place(self, packed: bytes, pictures: Sequence[Picture]) -> tuple[bytes, tuple[ImageSpan, ...]]:
        """A prompt with its images. Raises: ServingError if their numbers differ."""
        return self._placer.place(packed, pictures)

    def close(self) -> None:
        """Stop the image processes."""
        self._pool.close()


def open_desk(plan: RuntimePlan, vocabulary: Vocabulary, rundir: Path, context: zmq.Context[Any]) -> ImageDesk:
    """The desk for a checkpoint."""
    images = plan.model.images
    return NoImages() if images is None else VisionDesk(images, plan, vocabulary, rundir, context)
