"""Worker processes that draw examples and hand packed rows to the training loop."""

from __future__ import annotations

import multiprocessing
import queue
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Final

import numpy as np

from srt.builtin.tasks import FAMILIES, Example, draw_group, image_tasks, words
from tools.builtin import text
from tools.builtin.packing import Packer, Row, Sight, document, look
from tools.builtin.preprocess import CROP_SIDE, GLOBAL_SIDE, Pixels

WHOLES_MAX, CROPS_MAX = 14, 24
_WHOLE_BYTES: Final = GLOBAL_SIDE * GLOBAL_SIDE * 3
_CROP_BYTES: Final = CROP_SIDE * CROP_SIDE * 3
_SLOT_BYTES: Final = WHOLES_MAX * _WHOLE_BYTES + CROPS_MAX * _CROP_BYTES
_GROUP: Final = {"recall": 8, "recall_turns": 6, "tool_call": 6, "tool_joined": 5, "tool_missing": 4, "image_many": 4,
                 "effort": 4}  # fmt: skip
WAIT_S: Final = 90.0
NAMES: Final = tuple(FAMILIES)


def label_of(example: Example) -> list[tuple[int, int, int]]:
    """Return colour, shape and digit of each image as class numbers; -1 where it has none."""
    labels = []
    for picture in example.pictures:
        found = picture.label
        labels.append(
            (
                words.COLOURS.index(found["colour"]) if "colour" in found else -1,
                words.SHAPES.index(found["shape"]) if "shape" in found else -1,
                int(found["digit"]) if "digit" in found else -1,
            )
        )
    return labels


class Source:
    """Draws packed rows of a mix of families."""

    def __init__(self, weights: Mapping[str, float], seed: str, length: int, *, images: bool) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = text.build_tokenizer()
        self.ids = text.token_ids(self.tokenizer)
        self.names, self.weights = list(weights), list(weights.values())
        limits = (WHOLES_MAX, CROPS_MAX) if images else (0, 0)
        self.length = length
        self.packer = Packer(length, self.ids[text.PATCH], *limits)

    def row(self) -> Row:
        """Draw until a row is full."""
        while True:
            name = self.rng.choices(self.names, self.weights)[0]
            size = self.rng.randint(1, _GROUP.get(name, 1))
            examples = draw_group(name, self.rng, split="train", size=size)
            sight = look(examples[0], label_of(examples[0])) if examples[0].pictures else Sight()
            if len(sight.crops) > CROPS_MAX:
                continue
            made = document(self.tokenizer, self.ids, examples, NAMES.index(name), sight, self.length)
            row = self.packer.add(made) if made else None
            if row is not None:
                return row


def _view(memory: SharedMemory) -> memoryview:
    if memory.buf is None:
        raise ValueError("the shared memory is closed")
    return memory.buf


def _text_worker(out: Any, weights: Mapping[str, float], seed: str, length: int) -> None:
    source = Source(weights, seed, length, images=False)
    while True:
        out.put(source.row())


def _image_worker(
    out: Any, free: Any, slots: str, weights: Mapping[str, float], seed: str, length: int, fonts: Sequence[str]
) -> None:
    image_tasks.EXTRA_FONTS.extend(fonts)
    shared = SharedMemory(slots)
    memory = np.frombuffer(_view(shared), np.uint8)
    source = Source(weights, seed, length, images=True)
    while True:
        row = source.row()
        slot = free.get()
        start = slot * _SLOT_BYTES
        for picture in (*row.wholes, *row.crops):
            memory[start : start + picture.size] = picture.reshape(-1)
            start += picture.size
        out.put((slot, len(row.wholes), len(row.crops), replace(row, wholes=[], crops=[])))


class Supply:
    """Starts the workers; gives fresh rows, or an earlier one again when none is ready."""

    def __init__(
        self,
        text_weights: Mapping[str, float],
        image_weights: Mapping[str, float],
        *,
        seed: str,
        length: int,
        text_workers: int,
        image_workers: int,
        slots: int = 16,
        keep: int = 3000,
        fonts: Sequence[str] = (),
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.rng = random.Random(seed)
        self.keep, self.kept = keep, list[Row]()
        self.texts: Any = context.Queue(256)
        self.images: Any = context.Queue()
        self.free: Any = context.Queue()
        self.memory = SharedMemory(create=True, size=slots * _SLOT_BYTES)
        self.fresh = self.again = 0
        for slot in range(slots):
            self.free.put(slot)
        self.processes = [
            context.Process(target=_text_worker, args=(self.texts, text_weights, f"{seed} t{i}", length), daemon=True)
            for i in range(text_workers)
        ]
        self.processes += [
            context.Process(
                target=_image_worker,
                args=(self.images, self.free, self.memory.name, image_weights, f"{seed} i{i}", length, list(fonts)),
                daemon=True,
            )
            for i in range(image_workers)
        ]
        for process in self.processes:
            process.start()

    def text_row(self) -> Row:
        """Return a text row, preferring one that was never used."""
        must = len(self.kept) < 64
        try:
            row: Row = self.texts.get(block=must, timeout=WAIT_S if must else None)
        except queue.Empty:
            if must:
                raise
            self.again += 1
            return self.rng.choice(self.kept)
        self.fresh += 1
        if len(self.kept) < self.keep:
            self.kept.append(row)
        else:
            self.kept[self.rng.randrange(self.keep)] = row
        return row

    def image_row(self, *, wait: bool) -> tuple[Row, Pixels, Pixels] | None:
        """Return a new image row with its global views and crops as arrays, if one is ready."""
        try:
            slot, wholes, crops, row = self.images.get(block=wait, timeout=WAIT_S if wait else None)
        except queue.Empty:
            if wait:
                raise
            return None
        start = slot * _SLOT_BYTES
        raw = np.frombuffer(_view(self.memory), np.uint8)
        middle, end = start + wholes * _WHOLE_BYTES, start + wholes * _WHOLE_BYTES + crops * _CROP_BYTES
        whole = raw[start:middle].reshape(wholes, GLOBAL_SIDE, GLOBAL_SIDE, 3).copy()
        crop = raw[middle:end].reshape(crops, CROP_SIDE, CROP_SIDE, 3).copy()
        del raw
        self.free.put(slot)
        return row, whole, crop

    def close(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()
        self.memory.close()
        self.memory.unlink()
