"""Checkpoints and servers shared by the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.server import Server
from tests.support.workload import HuggingFace


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random multimodal checkpoint of a few MB in hub layout."""
    directory = tmp_path_factory.mktemp("checkpoints") / "nano"
    write_checkpoint(directory, "nano", seed=7)
    return directory


@pytest.fixture(scope="session")
def truth(nano: Path) -> HuggingFace:
    """The same checkpoint in transformers."""
    return HuggingFace(nano)


@pytest.fixture(scope="module")
def server(nano: Path) -> Iterator[Server]:
    """A server on the nano checkpoint in fp32 with default settings otherwise."""
    with Server("--model-path", str(nano), "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="session")
def builtin() -> Iterator[Server]:
    """A server on the built-in model, shared by all tests that only ask it."""
    with Server() as running:
        yield running
