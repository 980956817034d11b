"""Marks for tests that need a GPU, or run on one as well."""

from __future__ import annotations

from typing import Final

import pytest
import torch

ON_A_GPU: Final = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ON_TWO_GPUS: Final = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
ON_FOUR_GPUS: Final = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")]
DEVICES: Final = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
"""What `--device` is given: everywhere the CPU, and the GPU where there is one."""
