"""One server front for all tests of this package; tests that need another life start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.support.front import Front
from tests.support.tokens import VOCAB_SIZE, write_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer files."""
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    """The library's own tokenizer."""
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="session")
def front(model: Path) -> Iterator[Front]:
    """A front on small limits."""
    with Front(model, vocab_size=VOCAB_SIZE, served_model_name="test-model", max_body_bytes=200_000) as running:
        yield running
