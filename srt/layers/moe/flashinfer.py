"""What is called of FlashInfer, imported only when a GPU that has the kernels asks for it."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from torch import Tensor

from srt.layers.moe.trtllm import TrtllmKernels

OLDEST: Final = (0, 7, 2)
"""First version with SwigluStep and with the arguments that `srt.layers.moe.trtllm` passes."""


class FlashInferUnavailable(Exception):
    """FlashInfer cannot be used; the message says why."""


def trtllm_kernels() -> TrtllmKernels:
    """The TRT-LLM-Gen entry points of the installed FlashInfer.

    Raises: FlashInferUnavailable if it is not installed, too old, or does not import.
    """
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError as missing:
        raise FlashInferUnavailable("FlashInfer is not installed") from missing
    if tuple(int(part) for part in found.split(".")[:3]) < OLDEST:
        raise FlashInferUnavailable(f"FlashInfer {found} is installed, {'.'.join(map(str, OLDEST))} or newer is needed")
    try:
        moe, enums, flashinfer = (
            importlib.import_module(name) for name in ("flashinfer.fused_moe", "flashinfer.tllm_enums", "flashinfer")
        )
        encode = importlib.import_module("srt.layers.moe.triton_experts").encode
    except ImportError as broken:
        raise FlashInferUnavailable(f"FlashInfer {found} does not import: {broken}") from broken

    def encode_fp4(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = flashinfer.fp4_quantize(x, global_scale=factor, sf_vec_size=16, is_sf_swizzled_layout=False)
        return codes, scales

    return TrtllmKernels(
        bf16=moe.trtllm_bf16_routed_moe,
        fp8=moe.trtllm_fp8_block_scale_routed_moe,
        fp4=moe.trtllm_fp4_block_scale_routed_moe,
        encode_fp8=encode,
        encode_fp4=encode_fp4,
        swiglu=enums.ActivationType.Swiglu.value,
        swiglu_step=enums.ActivationType.SwigluStep.value,
        linear_scales=enums.SfLayout.layout_linear,
    )
