"""A backend that was picked, and which one attends."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Final

import torch

from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.layers.gpu import Gpu, current_gpu

AUTO_ATTENTION: Final = "triton"
"""What `--attention-backend auto` takes on a GPU. Prompts were no faster with FlashInfer (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Pick:
    """A backend by its key in a registry, why it was taken, and what its class is made with."""

    key: str
    reason: str
    arguments: tuple[object, ...] = ()


def choose_attention(found: Pick, plan: RuntimePlan, dtype: torch.dtype, kv_dtype: torch.dtype) -> Pick:
    """The attention that was asked for, or that is best; `found` is what this device offers.

    Raises: StartupError if what was asked for cannot run here.
    """
    gpu, asked = current_gpu(), plan.server.attention_backend
    wanted = asked
    if asked == "auto":
        wanted = AUTO_ATTENTION if found.key == "triton" else found.key
    if wanted == found.key:
        return found
    if wanted == "reference":
        return Pick("reference", "as asked")
    if gpu is None or importlib.util.find_spec("triton") is None:
        raise StartupError(f"--attention-backend {wanted}: needs a GPU, with Triton installed")
    if wanted == "triton":
        return Pick("triton", "as asked", (gpu,))
    pick, refused = _flashinfer(plan, gpu, dtype, kv_dtype)
    if refused is None:
        return pick
    if asked != "auto":
        raise StartupError(f"--attention-backend {wanted}: {refused}")
    return replace(found, reason=f"flashinfer: {refused}; {found.reason}")


def _flashinfer(plan: RuntimePlan, gpu: Gpu, dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[Pick, str | None]:
    """FlashInfer for prompts, and why it cannot be."""
    from srt.layers.attention.flashinfer import Shape, backend_of, refusal

    sizes, windows = (group.head_dim for group in plan.groups), (group.window is not None for group in plan.groups)
    shape = Shape(dtype, kv_dtype, frozenset(sizes), frozenset(windows))
    reason = f"{backend_of(gpu)} for prompts once it is compiled, Triton until then and for all else"
    return Pick("flashinfer", reason, (gpu, shape)), refusal(shape, gpu)


def compiled_attention(pick: Pick) -> Pick:
    """The part of it whose kernels can be compiled before they are needed."""
    return replace(pick, key="triton", arguments=pick.arguments[:1]) if pick.key == "flashinfer" else pick
