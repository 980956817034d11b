"""Images of the rows: which of a step's tokens are an image's, and which features stand there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.layers.batch import PlacedFeatures
from srt.messages import ImageSpan, ImageWork, RowStart, StepPlan
from srt.worker.image_features import ImageFeatures


class Part(NamedTuple):
    """What one step computes of one row: positions `[start, end)`, which are tokens from `token` on of the step."""

    row: int
    start: int
    end: int
    token: int


class RowImages(Protocol):
    """Knows the images of rows. Sees every plan."""

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows that begin anew and those that are given up."""
        ...

    def place(self, parts: Iterable[Part]) -> PlacedFeatures | None:
        """Features for the tokens of a step, None if no image is among them."""
        ...

    def report(self) -> ImageWork | None:
        """What has been done since the last report, None if nothing was to do."""
        ...

    def rehearse(self) -> None:
        """Encode as much as may be encoded at once, for nobody."""
        ...


class NoImages:
    """For a model that reads text alone."""

    def apply(self, plan: StepPlan) -> None:
        """Rows have no images."""

    def place(self, parts: Iterable[Part]) -> PlacedFeatures | None:
        """No token is an image's."""
        return None

    def report(self) -> ImageWork | None:
        """Nothing was done."""
        return None

    def rehearse(self) -> None:
        """There is no tower."""


@dataclass
class _Image:
    """An image of a row: `places` are the positions of its features, in order. `features` once it has been begun."""

    span: ImageSpan
    places: NDArray[np.int64]
    features: Tensor | None = field(default=None)

    @property
    def end(self) -> int:
        return self.span.start + self.span.tokens


class TowerImages:
    """For a model with an image tower. An image that a step computes in part holds its features until it is done."""

    def __init__(self, features: ImageFeatures, image_token_id: int) -> None:
        self._features = features
        self._image_token_id = image_token_id
        self._rows: dict[int, list[_Image]] = {}
        self._busy = False

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows that begin anew and those that are given up."""
        for row in plan.freed_rows:
            self._rows.pop(row, None)
        for start in plan.starts:
            self._rows.pop(start.row, None)
            if start.images:
                self._start(start)

    def _start(self, start: RowStart) -> None:
        ids = np.frombuffer(start.token_ids, dtype="<i4")
        images = self._rows[start.row] = []
        for span in start.images:
            own = ids[span.start : span.start + span.tokens]
            images.append(_Image(span, span.start + np.flatnonzero(own == self._image_token_id)))

    def place(self, parts: Iterable[Part]) -> PlacedFeatures | None:
        """Features for the tokens of a step, None if no image is among them."""
        if not self._rows:
            return None
        parts = list(parts)
        touched = [(part, image) for part in parts for image in self._among(part)]
        begun = [image for _, image in touched if image.features is None]
        if begun:
            self._busy = True
            rows = dict.fromkeys(part.row for part, _ in touched)
            found = self._features.get([image.span for image in begun], self._upcoming(rows))
            self._hand_out(rows, found)
        placed = self._gather(touched)
        for part in parts:
            self._drop_done(part)
        return placed

    def report(self) -> ImageWork | None:
        """What has been done since the last report, None if no image was begun."""
        busy, self._busy = self._busy, False
        return self._features.report() if busy else None

    def rehearse(self) -> None:
        """Encode as much as may be encoded at once, for nobody."""
        self._features.rehearse()

    def _among(self, part: Part) -> Iterator[_Image]:
        """Images of a row that a part of it reaches into."""
        for image in self._rows.get(part.row, ()):
            if image.span.start < part.end and part.start < image.end:
                yield image

    def _upcoming(self, rows: Iterable[int]) -> Iterator[ImageSpan]:
        """Images that these rows have not begun."""
        for row in rows:
            yield from (image.span for image in self._rows[row] if image.features is None)

    def _hand_out(self, rows: Iterable[int], found: dict[bytes, Tensor]) -> None:
        for row in rows:
            for image in self._rows[row]:
                if image.features is None:
                    image.features = found.get(image.span.key)

    def _gather(self, touched: list[tuple[Part, _Image]]) -> PlacedFeatures | None:
        tokens: list[NDArray[np.int64]] = []
        features: list[Tensor] = []
        for part, image in touched:
            first, last = np.searchsorted(image.places, (part.start, part.end))
            if first < last:
                assert image.features is not None, "features come before they are placed"
                tokens.append(image.places[first:last] - part.start + part.token)
                features.append(image.features[first:last])
        if not tokens:
            return None
        placed = torch.cat(features)
        return PlacedFeatures(torch.from_numpy(np.concatenate(tokens)).to(placed.device), placed)

    def _drop_done(self, part: Part) -> None:
        images = self._rows.get(part.row)
        if images is None:
            return
        left = [image for image in images if image.end > part.end]
        if left:
            self._rows[part.row] = left
        else:
            del self._rows[part.row]
