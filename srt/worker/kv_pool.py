"""KV memory: one pool of pages a group, laid out layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
            memory[layer] = KVLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    return [memory[layer] for layer in sorted(memory)]


def kv_bytes(memory: Sequence[KVLayer]) -> int:
    """Bytes of all layers."""
    return sum(2 * layer.k.numel() * layer.k.element_size() for layer in memory)
