"""Where there is no GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import torch

from tests.support.triton_interpreter import use_interpreter

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    use_interpreter()
