"""Placeholders to image tokens: exact places, exact numbers, and what does not match is refused."""

from __future__ import annotations

from array import array
from pathlib import Path

import msgspec
import pytest

from srt.errors import ServingError
from srt.messages import ImageSpan
from srt.tokenizer.image_prompt import ImagePlacer, Picture
from srt.tokenizer.layout import ImageTokenIds, image_token_ids
from srt.tokenizer.vocabulary import Vocabulary
from tests.support.checkpoints import write_checkpoint
from tests.support.pictures import STEP


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(write_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def ids(vocabulary: Vocabulary) -> ImageTokenIds:
    texts = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
    found = [vocabulary.id_of(text) for text in texts]
    return ImageTokenIds(*(index for index in found if index is not None))


@pytest.fixture(scope="module")
def placer(vocabulary: Vocabulary, ids: ImageTokenIds) -> ImagePlacer:
    return ImagePlacer(msgspec.structs.replace(STEP, image_token_id=ids.patch), vocabulary)


PLAIN, CUT = Picture(b"a" * 32, 0, 0), Picture(b"b" * 32, 2, 1)


def pack(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


def written(picture: Picture, ids: ImageTokenIds) -> list[int]:
    return image_token_ids(picture.columns, picture.rows, STEP, ids)


def test_each_placeholder_becomes_its_image(placer: ImagePlacer, ids: ImageTokenIds) -> None:
    packed, spans = placer.place(pack([7, ids.patch, 8, ids.patch, ids.patch, 9]), [PLAIN, CUT, PLAIN])
    plain, cut = written(PLAIN, ids), written(CUT, ids)
    assert packed == pack([7, *plain, 8, *cut, *plain, 9])
    assert spans == (
        ImageSpan(PLAIN.key, 1, 171, 0, 0),
        ImageSpan(CUT.key, 173, 337, 2, 1),
        ImageSpan(PLAIN.key, 510, 171, 0, 0),
    )


def test_images_that_are_written_out_stay_as_they_are(placer: ImagePlacer, ids: ImageTokenIds) -> None:
    whole, spans = placer.place(pack([ids.patch, 5, ids.patch]), [CUT, PLAIN])
    assert placer.place(whole, [CUT, PLAIN]) == (whole, spans)
    mixed = pack([*written(CUT, ids), 5, ids.patch])
    assert placer.place(mixed, [CUT, PLAIN]) == (whole, spans)


def test_an_image_written_out_for_another_layout_is_refused(placer: ImagePlacer, ids: ImageTokenIds) -> None:
    with pytest.raises(ServingError, match=r"the prompt has \d+ image placeholders \(<im_patch>\) for 1 images"):
        placer.place(pack([5, *written(CUT, ids)]), [PLAIN])


@pytest.mark.parametrize(("placeholders", "images"), [(0, 1), (1, 0), (2, 1), (1, 3), (3, 2)])
def test_another_number_of_placeholders_than_images_is_refused(
    placer: ImagePlacer, ids: ImageTokenIds, placeholders: int, images: int
) -> None:
    with pytest.raises(ServingError) as caught:
        placer.place(pack([5, *[ids.patch, 6] * placeholders]), [PLAIN] * images)
    expected = f"the prompt has {placeholders} image placeholders (<im_patch>) for {images} images"
    assert caught.value.text == expected


def test_text_alone_passes_untouched(placer: ImagePlacer) -> None:
    packed = pack([1, 2, 3])
    assert placer.place(packed, ()) == (packed, ())


def test_the_mark_of_images_is_not_that_of_chat_turns(vocabulary: Vocabulary, ids: ImageTokenIds) -> None:
    assert vocabulary.id_of("<|im_start|>") not in (None, ids.view_start)


def test_a_vocabulary_without_marks_cannot_serve_images(tmp_path: Path) -> None:
    from srt.errors import StartupError

    path = write_checkpoint(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace("<patch_newline>", "<something_else>"))
    with pytest.raises(StartupError, match="its tokenizer lacks <patch_newline>"):
        ImagePlacer(msgspec.structs.replace(STEP, image_token_id=5), Vocabulary(tmp_path))
