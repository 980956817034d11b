"""Images in a prompt: each placeholder becomes the tokens of its image."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from srt.configs.plan import ImageConfig
from srt.errors import ErrorCode, ServingError, StartupError
from srt.messages import ImageSpan
from srt.tokenizer.layout import ImageTokenIds, image_token_ids
from srt.tokenizer.vocabulary import Vocabulary

MARKS: Final = {
    "view_start": "<im_start>",
    "view_end": "<im_end>",
    "crop_start": "<patch_start>",
    "crop_end": "<patch_end>",
    "row_end": "<patch_newline>",
}
"""Marks around features, by their text; their ids differ between checkpoints. `<|im_start|>` is something else."""


class Picture(NamedTuple):
    """An image that is made: `key` names its tiles."""

    key: bytes
    columns: int
    rows: int


class ImagePlacer:
    """Puts images into prompts of one checkpoint.

    Raises: StartupError if the vocabulary lacks a token that images are written with.
    """

    def __init__(self, config: ImageConfig, vocabulary: Vocabulary) -> None:
        self._config = config
        placeholder = vocabulary.text_of(config.image_token_id)
        ids = {name: vocabulary.id_of(text) for name, text in MARKS.items()}
        missing = [MARKS[name] for name, index in ids.items() if index is None]
        if missing or placeholder is None:
            lacking = ", ".join(missing) or f"the token {config.image_token_id} that config.json names"
            raise StartupError(f"the model takes images, but its tokenizer lacks {lacking}")
        self.placeholder = placeholder
        self._ids = ImageTokenIds(
            patch=config.image_token_id, **{name: index for name, index in ids.items() if index is not None}
        )

    def place(self, packed: bytes, pictures: Sequence[Picture]) -> tuple[bytes, tuple[ImageSpan, ...]]:
        """The prompt with each placeholder replaced, and where the images are.

        An image whose tokens are written out already, as in the ids that an answer may repeat, stays as it is.
        Raises: ServingError if the prompt does not have one placeholder for each image.
        """
        ids = array("i", packed)
        placed = array("i")
        spans: list[ImageSpan] = []
        copied = 0
        for number, picture in enumerate(pictures):
            at = _index(ids, self._ids.patch, copied)
            if at is None:
                raise self._mismatch(number, len(pictures))
            written = array("i", image_token_ids(picture.columns, picture.rows, self._config, self._ids))
            whole = at > copied and ids[at - 1 : at - 1 + len(written)] == written
            begin, end = (at - 1, at - 1 + len(written)) if whole else (at, at + 1)
            placed += ids[copied:begin]
            spans.append(ImageSpan(picture.key, len(placed), len(written), picture.columns, picture.rows))
            placed += written
            copied = end
        more = ids[copied:].count(self._ids.patch)
        if more:
            raise self._mismatch(len(pictures) + more, len(pictures))
        return (packed, ()) if not pictures else ((placed + ids[copied:]).tobytes(), tuple(spans))

    def _mismatch(self, found: int, images: int) -> ServingError:
        return ServingError(
            ErrorCode.INVALID_REQUEST,
            f"the prompt has {found} image placeholders ({self.placeholder}) for {images} images",
            "prompt",
        )


def _index(ids: array[int], wanted: int, start: int) -> int | None:
    """Where an id comes next; None if it does not."""
    try:
        return ids.index(wanted, start)
    except ValueError:
        return None
