from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from srt.layers.cpu.build import FLAGS, build
from srt.layers.cpu.kernels import Kernels, load_kernels


@pytest.fixture(scope="session")
def kernels(pytestconfig: pytest.Config) -> Kernels:
    """The library as this machine compiles it, on two threads."""
    cache = pytestconfig.cache
    assert cache is not None
    return load_kernels(cache.mkdir("kernels"), threads=2)


@pytest.fixture(scope="session")
def portable(pytestconfig: pytest.Config) -> Kernels:
    """The same library without any vector units beyond the architecture's first."""
    assert pytestconfig.cache is not None
    flags = [flag for flag in FLAGS if flag != "-march=native"]
    return Kernels(build(pytestconfig.cache.mkdir("portable"), flags=flags), threads=2)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever `torch.empty` returns is full of NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(20240607)
