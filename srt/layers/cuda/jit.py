"""Kernels that can be compiled before they are launched.

Triton compiles a kernel where it is first launched, and whoever launches it waits. In its `AsyncCompileMode` it may be
asked for without a launch, and many are compiled at the same time; there, kernels of this module are never launched,
so a whole step can be run on tensors that have shapes and no memory (`srt/worker/device/ahead.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import JITFunction, knobs
from triton.runtime import _async_compile


class Kernel(JITFunction):  # type: ignore[misc]
    """A kernel that is only compiled, not launched, in `AsyncCompileMode`."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        """Launch it; in that mode, have it compiled."""
        return super().run(*args, grid=grid, warmup=warmup or _async_compile.active_mode.get() is not None, **options)


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` with its options, for what is launched; functions that kernels call take Triton's own."""
    if knobs.runtime.interpret:
        return lambda function: triton.jit(function, **options)
    return lambda function: Kernel(function, **options)
