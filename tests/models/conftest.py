"""What tests of whole models share: a small checkpoint of random weights, and the kernels that the CPU runs it with."""

from __future__ import annotations

from pathlib import Path

import pytest

from srt.layers.cpu.kernels import load_kernels
from srt.worker.startup import Pick, Picks
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody writes into it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def native(pytestconfig: pytest.Config) -> Picks:
    """The native kernels for everything, built once and kept in pytest's cache."""
    assert pytestconfig.cache is not None
    pick = Pick("native", "under test", (load_kernels(pytestconfig.cache.mkdir("kernels"), threads=2),))
    return Picks(pick, pick, pick, pick)
