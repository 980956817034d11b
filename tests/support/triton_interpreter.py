"""Triton without a GPU: its interpreter, with what it gets wrong put right.

Triton 3.6's interpreter multiplies bfloat16 by their bit patterns, loses the carry when a number that is rounded
to bfloat16 or e4m3 becomes a power of two, and cannot count a loop to a number that is not known before (with a NumPy
that makes no scalar of an array of one). Kernels do none of it on a GPU. Nor does it know how kernels wait for each
other, which here they need not: each has ended when the next begins.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch


def use_interpreter_without_a_gpu() -> None:
    """Let kernels run on the CPU where there is no GPU, if Triton is there; to be called before anything imports it."""
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        use_interpreter()


def use_interpreter() -> None:
    """Let kernels run on the CPU; to be called before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    from srt.layers.cuda import launch

    dtypes = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
    dtypes[tl.float8e4nv] = torch.float8_e4m3fn

    def numbers(bits: Any, dtype: Any) -> torch.Tensor:
        width = getattr(np, f"int{dtype.primitive_bitwidth}")
        return torch.from_numpy(np.ascontiguousarray(bits).view(width)).view(dtypes[dtype])

    def convert(bits: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        found = numbers(bits, given).to(dtypes[wanted])
        size = wanted.primitive_bitwidth
        return found.view(getattr(torch, f"int{size}")).numpy().view(getattr(np, f"uint{size}")).reshape(bits.shape)

    def dot(self: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
        product = numbers(a.data, a.dtype.scalar).float() @ numbers(b.data, b.dtype.scalar).float()
        return interpreter.TensorHandle(product.numpy() + total.data, total.dtype.scalar)

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    for wait in ("gdc_wait", "gdc_launch_dependents"):
        setattr(launch, wait, lambda: None)
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
