"""Packs examples into rows: one document is a shared prefix and branches that do not see each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from srt.builtin.tasks import Example
from tools.builtin import text
from tools.builtin.preprocess import CROP_TOKENS, GLOBAL_TOKENS, Layout, Pixels, cut, image_tokens

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

# Branches keep this much of the common text, so that what an MTP module reads past the end of
# the prefix is the same in each of them.
COMMON_TAIL: Final = 4
# Tokens of long answers count less, except the last ones, where it is decided to stop.
SHORT_TOKENS: Final = 24
END_TOKENS: Final = 8
# Answers about images are short and few among all tokens.
IMAGE_WEIGHT: Final = 5.0
_SAFE: Final = re.compile(r"(?<=[^\s<]) (?=[A-Za-z])")


@dataclass(frozen=True)
class Sight:
    """The cut images of one example, and a label of each for the tower's auxiliary loss."""

    wholes: list[Pixels] = field(default_factory=list)
    crops: list[Pixels] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    labels: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """Token arrays of one document. Weight 0 marks tokens that nothing is to be learned from."""

    ids: Ints
    weights: Floats
    positions: Ints
    branches: Ints
    families: Ints
    sight: Sight

    def __len__(self) -> int:
        return len(self.ids)


def look(example: Example, labels: Sequence[tuple[int, int, int]]) -> Sight:
    """Cut the images of an example."""
    sight = Sight(labels=list(labels))
    for picture in example.pictures:
        layout, whole, crops = cut(picture.pixels)
        sight.layouts.append(layout)
        sight.wholes.append(whole)
        sight.crops.extend(crops)
    return sight


def encode(tokenizer: Tokenizer, ids: dict[str, int], rendered: str, layouts: Sequence[Layout]) -> list[int]:
    """Tokenise a rendered chat; each `<im_patch>` becomes the tokens of its image."""
    tokens: list[int] = tokenizer.encode(rendered, add_special_tokens=False).ids
    if not layouts:
        return tokens
    left = iter(layouts)
    expanded: list[int] = []
    for token in tokens:
        expanded.extend(image_tokens(next(left), ids) if token == ids[text.PATCH] else (token,))
    return expanded


def document(
    tokenizer: Tokenizer, ids: dict[str, int], examples: Sequence[Example], family: int, sight: Sight, limit: int
) -> Document | None:
    """Make one document of examples that share their beginning, or nothing if it is too long."""
    rendered = [text.render_whole(example) for example in examples]
    if len(rendered) > 1 and text.PATCH in rendered[0][len(_beginning(rendered)) :]:
        # The images come after what differs: keep one example, whose images are seen once.
        rendered = rendered[:1]
    wholes, prompts = _encoded(tokenizer, ids, rendered, sight.layouts)
    shared = 0
    if len(wholes) > 1:
        shared = max(0, min(_common(wholes) - COMMON_TAIL, min(prompts) - 2 * COMMON_TAIL))
        wholes, prompts = (wholes, prompts) if shared else (wholes[:1], prompts[:1])
    rows: list[tuple[list[int], list[float], range, int]] = []
    if shared:
        rows.append((wholes[0][:shared], [0.0] * shared, range(shared), 0))
    total = shared
    for index, (tokens, prompt) in enumerate(zip(wholes, prompts, strict=True)):
        own = len(tokens) - shared
        if len(tokens) > limit or (rows and total + own > limit):
            break
        answer = len(tokens) - prompt
        weight = min(1.0, (SHORT_TOKENS / answer) ** 0.5)
        last = IMAGE_WEIGHT if sight.wholes else 1.0
        end = min(answer, END_TOKENS)
        weights = [0.0] * (prompt - shared) + [weight * last] * (answer - end) + [last] * end
        rows.append((tokens[shared:], weights, range(shared, len(tokens)), index + 1 if shared else 0))
        total += own
    if len(rows) < (2 if shared else 1):
        return None
    tokens_all = np.concatenate([np.asarray(row[0], np.int32) for row in rows])
    return Document(
        ids=tokens_all,
        weights=np.concatenate([np.asarray(row[1], np.float32) for row in rows]),
        positions=np.concatenate([np.asarray(row[2], np.int32) for row in rows]),
        branches=np.concatenate([np.full(len(row[0]), row[3], np.int32) for row in rows]),
        families=np.full(len(tokens_all), family, np.int32),
        sight=sight,
    )


def _encoded(
    tokenizer: Tokenizer, ids: dict[str, int], rendered: list[str], layouts: Sequence[Layout]
) -> tuple[list[list[int]], list[int]]:
    """Tokenise texts that begin alike, the common part once; return them and the lengths of their prompts."""
    common = _beginning(rendered)
    common = common[: min(whole.rindex(text.GENERATION_PROMPT) for whole in rendered)]
    # Before a space and a letter a piece always ends, so the text may be cut there.
    cut_at = max((found.start() for found in _SAFE.finditer(common, max(0, len(common) - 200))), default=0)
    head = encode(tokenizer, ids, common[:cut_at], layouts) if cut_at else []
    rest = layouts if text.PATCH not in common[:cut_at] else ()
    wholes, prompts = [], []
    for whole in rendered:
        start = whole.rindex(text.GENERATION_PROMPT) + len(text.GENERATION_PROMPT)
        prompt = [*head, *encode(tokenizer, ids, whole[cut_at:start], rest)]
        prompts.append(len(prompt))
        wholes.append([*prompt, *encode(tokenizer, ids, whole[start:], ())])
    return wholes, prompts


def _beginning(texts: Sequence[str]) -> str:
    """Return the longest text that all texts begin with."""
    low, high = min(texts), max(texts)
    for index, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return low[:index]
    return low


def _common(rows: Sequence[list[int]]) -> int:
    low, high = min(rows), max(rows)
    for index, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return index
    return min(len(low), len(high))


@dataclass(frozen=True)
class Row:
    """Documents laid end to end, padded to a fixed length. All arrays but the images are [L].

    `features` names, for every `<im_patch>`, its place in the row's features: global views
    first, then crops; -1 elsewhere.
    """

    ids: Ints
    weights: Floats
    positions: Ints
    branches: Ints
    documents: Ints
    families: Ints
    features: Ints
    wholes: list[Pixels]
    crops: list[Pixels]
    labels: list[tuple[int, int, int]]


class Packer:
    """Collects documents and gives out full rows."""

    def __init__(self, length: int, patch_id: int, wholes_max: int = 0, crops_max: int = 0) -> None:
        self.length, self.patch_id = length, patch_id
        self.wholes_max, self.crops_max = wholes_max, crops_max
        self.waiting: list[Document] = []

    def add(self, made: Document) -> Row | None:
        """Take one document; return a row once enough are waiting to fill it well."""
        self.waiting.append(made)
        if sum(map(len, self.waiting)) < 1.4 * self.length and not self._crowded():
            return None
        chosen: list[Document] = []
        room, wholes, crops = self.length, self.wholes_max, self.crops_max
        for item in sorted(self.waiting, key=len, reverse=True):
            sight = item.sight
            if len(item) <= room and len(sight.wholes) <= wholes and len(sight.crops) <= crops:
                chosen.append(item)
                room -= len(item)
                wholes -= len(sight.wholes)
                crops -= len(sight.crops)
        taken = {id(item) for item in chosen}
        self.waiting = [item for item in self.waiting if id(item) not in taken]
        if not chosen:
            self.waiting.clear()
            return None
        return self._row(chosen)

    def _crowded(self) -> bool:
        wholes = sum(len(item.sight.wholes) for item in self.waiting)
        crops = sum(len(item.sight.crops) for item in self.waiting)
        return wholes > 1.4 * self.wholes_max + 1 or crops > 1.4 * self.crops_max + 1

    def _row(self, chosen: list[Document]) -> Row:
        def joined(name: str, fill: int) -> NDArray[np.generic]:
            arrays = [getattr(item, name) for item in chosen]
            whole = np.full(self.length, fill, arrays[0].dtype)
            used = np.concatenate(arrays)
            whole[: len(used)] = used
            return whole

        documents = np.full(self.length, len(chosen), np.int32)
        features = np.full(self.length, -1, np.int32)
        wholes = [whole for item in chosen for whole in item.sight.wholes]
        start, whole_at, crop_at = 0, 0, len(wholes) * GLOBAL_TOKENS
        for index, item in enumerate(chosen):
            documents[start : start + len(item)] = index
            places: list[range] = []
            for layout in item.sight.layouts:
                for _ in range(layout.crops):
                    places.append(range(crop_at, crop_at + CROP_TOKENS))
                    crop_at += CROP_TOKENS
                places.append(range(whole_at, whole_at + GLOBAL_TOKENS))
                whole_at += GLOBAL_TOKENS
            if places:
                at = start + np.flatnonzero(item.ids == self.patch_id)
                features[at] = np.concatenate([np.asarray(place, np.int32) for place in places])
            start += len(item)
        return Row(
            ids=joined("ids", 2).astype(np.int32),
            weights=joined("weights", 0).astype(np.float32),
            positions=joined("positions", 0).astype(np.int32),
            branches=joined("branches", 0).astype(np.int32),
            documents=documents,
            families=joined("families", 0).astype(np.int32),
            features=features,
            wholes=wholes,
            crops=[crop for item in chosen for crop in item.sight.crops],
            labels=[label for item in chosen for label in item.sight.labels],
        )
