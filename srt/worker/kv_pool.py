"""KV memory: one pool of pages a group, laid out layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from srt.configs.plan import GroupPlan
from srt.layers.batch import KVLayer


def allocate_kv(groups: Sequence[GroupPlan], page_size: int, ranks: int, dtype: torch.dtype) -> list[KVLayer]:
    """Zeroed memory of every layer, in layer order, for this rank's share of the heads.

    k and v are [pages + 1, page_size, kv_heads / ranks, head_dim]; page 0 is the null page: unused entries of page
    tables point at it, and it holds finite values so that a masked read of it cannot spoil a sum.
    """
    memory: dict[int, KVLayer] = {}
    for group in groups:
        shape = (group.pages + 1, page_size, group.kv_heads // ranks, group.head_dim)
        for layer in group.layers:
            memory[layer] = KVLayer(_zeros(shape, dtype), _zeros(shape, dtype))
    return [memory[layer] for layer in sorted(memory)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory. On the host, the system hands it out page by page when it is first written; torch.zeros touches
    all."""
    if torch.get_default_device().type != "cpu":
        return torch.zeros(shape, dtype=dtype)
    flat = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)


def kv_bytes(memory: Sequence[KVLayer]) -> int:
    """Bytes of all layers."""
    return sum(2 * layer.k.numel() * layer.k.element_size() for layer in memory)
