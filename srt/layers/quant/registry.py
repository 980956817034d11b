"""Weight formats by the name that a checkpoint's reader gives them."""

from __future__ import annotations

import torch

from srt.layers.quant.contract import WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import Nvfp4
from srt.layers.quant.plain import Plain


def format_of(name: str, dtype: torch.dtype) -> WeightFormat:
    """The format `plain` (in `dtype`), `fp8`, `nvfp4` or `nvfp4-a16`.

    Raises: KeyError for any other name.
    """
    formats: dict[str, WeightFormat] = {
        "plain": Plain(dtype),
        "fp8": Fp8Blocks(),
        "nvfp4": Nvfp4(),
        "nvfp4-a16": Nvfp4(inputs=False),
    }
    return formats[name]
