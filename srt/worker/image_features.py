"""Features of images: computed by the tower in batches, kept by content.

Images that a step needs go through the tower together, views of one size in one batch, whichever rows they belong
to. If the tower has to run at all, images that the same rows need next ride along as far as the batch has room.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from srt.configs.memory import PIXELS_PER_BATCH
from srt.configs.plan import ImageConfig
from srt.layers.gpu import to_device
from srt.messages import ImageSpan, ImageWork
from srt.models.contract import ImageEncoder
from srt.tiles import TileFiles


@dataclass
class _Tally:
    """What the tower has done since the last report."""

    images: int = 0
    hits: int = 0
    batches: int = 0
    elapsed_ns: int = 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads: text may run on kernels with threads of their own and leave torch just one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ImageFeatures:
    """Features by key, least recently used first out. Whoever still needs an evicted one holds it himself."""

    def __init__(
        self,
        tower: ImageEncoder,
        tiles: TileFiles,
        config: ImageConfig,
        device: torch.device,
        *,
        budget_bytes: int,
        threads: int,
    ) -> None:
        self._tower, self._tiles, self._config, self._device = tower, tiles, config, device
        self._budget_bytes, self._threads = budget_bytes, threads
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._tally = _Tally()

    def get(self, needed: Sequence[ImageSpan], upcoming: Iterable[ImageSpan]) -> dict[bytes, Tensor]:
        """Features [F, H] by key of all needed images, and of whichever of the upcoming ones have been computed too.

        In the order in which a prompt shows them: crops row by row, then the global view.
        """
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, ImageSpan] = {}
        for span in needed:
            kept = self._kept.get(span.key)
            if kept is None:
                missing[span.key] = span
            else:
                self._kept.move_to_end(span.key)
                found[span.key] = kept
        self._tally.hits += len(needed) - len(missing)
        if missing:
            began = time.perf_counter_ns()
            with torch_threads(self._threads):
                found |= self._encode(self._with_company(missing, upcoming))
            self._tally.elapsed_ns += time.perf_counter_ns() - began
        return found

    def report(self) -> ImageWork:
        """What has been done since the last report."""
        tally, self._tally = self._tally, _Tally()
        return ImageWork(tally.images, tally.hits, tally.batches, tally.elapsed_ns // 1_000)

    def rehearse(self) -> None:
        """Encode a full batch of either size for nobody: what that needs is loaded and there then."""
        for size in (self._config.view_size, self._config.crop_size):
            count = max(1, PIXELS_PER_BATCH // size**2)
            self._tower.encode(torch.zeros(count, size, size, 3, dtype=torch.uint8, device=self._device))

    def _with_company(self, missing: dict[bytes, ImageSpan], upcoming: Iterable[ImageSpan]) -> list[ImageSpan]:
        """What is missing, and upcoming images while the batch has room."""
        pixels = sum(self._pixels(span) for span in missing.values())
        for span in upcoming:
            if span.key in missing or span.key in self._kept:
                continue
            pixels += self._pixels(span)
            if pixels > PIXELS_PER_BATCH:
                break
            missing[span.key] = span
        return list(missing.values())

    def _pixels(self, span: ImageSpan) -> int:
        return self._tiles.bytes_of(span.columns * span.rows) // 3

    def _encode(self, spans: list[ImageSpan]) -> dict[bytes, Tensor]:
        """Features of images that are not there yet, by key; they are kept as far as the budget goes."""
        crops: list[Tensor] = []
        views: list[Tensor] = []
        for span in spans:
            cut, whole = self._tiles.read(span.key, span.columns * span.rows)
            crops += self._moved(cut, self._config.crop_size)
            views += self._moved(whole, self._config.view_size)
        crop_features, view_features = iter(self._run(crops)), iter(self._run(views))
        encoded: dict[bytes, Tensor] = {}
        for span in spans:
            parts = [*islice(crop_features, span.columns * span.rows), next(view_features)]
            encoded[span.key] = torch.cat(parts)
            self._keep(span.key, encoded[span.key])
        self._tally.images += len(spans)
        return encoded

    def _moved(self, pixels: memoryview, size: int) -> tuple[Tensor, ...]:
        """Views of one image on the model's device; the copy runs beside whatever the device is doing."""
        if not pixels:
            return ()
        tensor = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, size, size, 3)
        views: tuple[Tensor, ...] = to_device(tensor, self._device).unbind()
        return views

    def _run(self, views: list[Tensor]) -> list[Tensor]:
        """Features of views of one size, in as few batches as are allowed."""
        features: list[Tensor] = []
        size = max(1, PIXELS_PER_BATCH // views[0][..., 0].numel()) if views else 1
        for start in range(0, len(views), size):
            features += self._tower.encode(torch.stack(views[start : start + size])).unbind()
            self._tally.batches += 1
        return features

    def _keep(self, key: bytes, features: Tensor) -> None:
        self._kept[key] = features
        self._kept_bytes += features.nbytes
        while self._kept_bytes > self._budget_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
