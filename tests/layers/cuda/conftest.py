"""Where there is no GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_interpreter import use_interpreter_without_a_gpu

use_interpreter_without_a_gpu()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(20240607)
