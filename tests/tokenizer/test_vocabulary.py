"""Ids and bytes, against the tokenizers library and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from srt.errors import StartupError
from srt.tokenizer.vocabulary import Vocabulary
from tests.support.tokens import VOCAB_SIZE, write_tokenizer

IDS = st.lists(st.integers(0, VOCAB_SIZE + 20), max_size=40)


@given(ids=IDS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_decoding_equals_the_library_for_any_ids(
    ids: list[int], skip: bool, vocabulary: Vocabulary, reference: Tokenizer
) -> None:
    assert vocabulary.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_a_round_trip(text: str, vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(text, add_special_tokens=True)
    assert vocabulary.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("opening", ["", "<|bos|> "])
def test_opening_tokens_are_those_of_transformers(tmp_path: Path, opening: str, add_bos_token: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = write_tokenizer(tmp_path)
    if opening:
        tokenizer.post_processor = TemplateProcessing(single=opening + "$A", special_tokens=[("<|bos|>", 0)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "add_bos_token": add_bos_token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Vocabulary(tmp_path)
    assert ours.encode("hello world", add_special_tokens=True) == theirs.encode("hello world")
    assert ours.encode("hello world", add_special_tokens=False) == theirs.encode(
        "hello world", add_special_tokens=False
    )
    assert ours.encode("x", add_special_tokens=True)[0] == (
        0 if opening else ours.encode("x", add_special_tokens=False)[0]
    )


def test_a_tokenizer_without_the_byte_level_decoder_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json is missing"):
        Vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"decoder": {"type": "Metaspace"}}')
    with pytest.raises(StartupError, match="Metaspace"):
        Vocabulary(tmp_path)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"decoder": {"type": "ByteLevel"}}')
    with pytest.raises(StartupError, match=r"tokenizer\.json is not a tokenizer"):
        Vocabulary(tmp_path)
