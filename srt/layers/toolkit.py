"""What start-up chose for a model to be built of: backends, dtype and the group of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from srt.distributed import TensorGroup
from srt.layers.attention.contract import AttentionBackend
from srt.layers.linear import LinearFormat
from srt.layers.moe.contract import ExpertRunner
from srt.layers.ops import Ops


@dataclass(frozen=True)
class Toolkit:
    """Handed to every layer; layers look nowhere else.

    `experts` has a runner for each layer with routed experts, by layer number. `positions` is the number of rotary
    positions to prepare; `dtype` is that of activations and of weights that are not quantised; `ep_size` the number
    of groups of ranks that share the experts out.
    """

    ops: Ops
    linear: LinearFormat
    attention: AttentionBackend
    experts: Mapping[int, ExpertRunner]
    group: TensorGroup
    dtype: torch.dtype
    positions: int
    ep_size: int = 1
