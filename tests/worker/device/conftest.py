"""Where there is no GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

from tests.support.triton_interpreter import use_interpreter_without_a_gpu

use_interpreter_without_a_gpu()
