"""Puts packed rows on the device: masks, rope tables, and images drawn from a pool kept there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tools.builtin.layers import Masks, Rope
from tools.builtin.model import dense_masks, rope_for
from tools.builtin.packing import Row
from tools.builtin.preprocess import CROP_TOKENS, GLOBAL_TOKENS
from tools.builtin.shape import Shape
from tools.builtin.supply import CROPS_MAX, WHOLES_MAX, Supply


@dataclass(frozen=True)
class Sights:
    """Images of the last rows of a batch. `places` [M, L] indexes features (global views first), -1 for text."""

    wholes: Tensor
    crops: Tensor
    places: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's rows on the device. Shapes: [B, L]."""

    ids: Tensor
    weights: Tensor
    families: Tensor
    rope: Rope
    masks: Masks
    sights: Sights | None


@dataclass(frozen=True)
class Seen:
    """An image row whose pixels are on the device."""

    row: Row
    wholes: Tensor
    crops: Tensor


class Pool:
    """Image rows on the device, filled by a thread while training draws from it."""

    def __init__(self, supply: Supply, device: torch.device, capacity: int, seed: str) -> None:
        self.supply, self.device, self.capacity = supply, device, capacity
        self.rng = random.Random(seed)
        self.items: list[Seen] = []
        self.received = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)

    def start(self, ready: int) -> None:
        """Wait for `ready` rows, then keep receiving in the background."""
        while len(self.items) < ready:
            self._receive(wait=True)
        self.thread.start()

    def draw(self, count: int) -> list[Seen]:
        """Return different rows, any age."""
        return self.rng.sample(self.items, count)

    def stop(self) -> None:
        """End the thread."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join()

    def _fill(self) -> None:
        while not self.stopping.is_set():
            if not self._receive(wait=False):
                self.stopping.wait(0.005)

    def _receive(self, *, wait: bool) -> bool:
        found = self.supply.image_row(wait=wait)
        if found is None:
            return False
        row, wholes, crops = found
        item = Seen(row, torch.from_numpy(wholes).to(self.device), torch.from_numpy(crops).to(self.device))
        if len(self.items) < self.capacity:
            self.items.append(item)
        else:
            self.items[self.received % self.capacity] = item
        self.received += 1
        return True


class Assembler:
    """Builds batches of a fixed number of text and image rows."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device

    def _tensor(self, rows: Sequence[Row], name: str) -> Tensor:
        array = np.stack([getattr(row, name) for row in rows])
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def batch(self, texts: Sequence[Row], seen: Sequence[Seen]) -> Batch:
        """Lay text rows first, image rows last."""
        rows = [*texts, *(item.row for item in seen)]
        positions = self._tensor(rows, "positions").long()
        documents, branches = self._tensor(rows, "documents"), self._tensor(rows, "branches")
        masks = self._masks(positions, documents, branches)
        return Batch(
            ids=self._tensor(rows, "ids").long(),
            weights=self._tensor(rows, "weights"),
            families=self._tensor(rows, "families").long(),
            rope=rope_for(self.shape, positions),
            masks=masks,
            sights=self._sights(seen) if seen else None,
        )

    def _masks(self, positions: Tensor, documents: Tensor, branches: Tensor) -> Masks:
        if self.device.type != "cuda":
            return dense_masks(self.shape, positions, documents, branches)
        batch, length = positions.shape
        window = self.shape.window

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (documents[b, q] == documents[b, k]) & (q >= k)
            return same & ((branches[b, k] == 0) | (branches[b, k] == branches[b, q]))

        def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen(b, h, q, k) & (positions[b, q] - positions[b, k] < window)

        def build(rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Masks:
            made = create_block_mask(rule, batch, None, length, length, device=str(self.device), _compile=True)
            return {"": made}

        return {self.shape.kind(0): build(seen)[""], self.shape.kind(1): build(near)[""]}

    def _sights(self, seen: Sequence[Seen]) -> Sights:
        wholes_max, crops_max = WHOLES_MAX * len(seen), CROPS_MAX * len(seen)
        whole_at = crop_at = 0
        places = []
        for item in seen:
            own = item.row.features.astype(np.int64)
            limit = len(item.wholes) * GLOBAL_TOKENS
            moved = np.where(
                own < limit,
                own + whole_at * GLOBAL_TOKENS,
                own - limit + wholes_max * GLOBAL_TOKENS + crop_at * CROP_TOKENS,
            )
            places.append(np.where(own < 0, -1, moved))
            whole_at += len(item.wholes)
            crop_at += len(item.crops)
        labels = np.full((wholes_max, 3), -1, np.int64)
        labels[:whole_at] = np.concatenate([np.asarray(item.row.labels).reshape(-1, 3) for item in seen])
        return Sights(
            wholes=_filled([item.wholes for item in seen], wholes_max),
            crops=_filled([item.crops for item in seen], crops_max),
            places=torch.from_numpy(np.stack(places)).to(self.device),
            labels=torch.from_numpy(labels).to(self.device),
        )


def _filled(pictures: Sequence[Tensor], count: int) -> Tensor:
    """Join pictures and fill up with copies, so that the tower always sees one shape."""
    joined = torch.cat(list(pictures))
    missing = count - len(joined)
    if missing <= 0:
        return joined
    return torch.cat((joined, joined.new_zeros((missing, *joined.shape[1:]))))
