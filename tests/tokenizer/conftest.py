"""One tokenizer for all tests of this package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from srt.tokenizer.vocabulary import Vocabulary
from tests.support.site import Site
from tests.support.tokens import write_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer files."""
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def reference(model: Path) -> Tokenizer:
    """The library's own tokenizer."""
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="session")
def vocabulary(model: Path) -> Vocabulary:
    """Ours."""
    return Vocabulary(model)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()
