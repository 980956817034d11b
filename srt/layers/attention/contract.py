"""What an attention backend does for a layer: prepare q and k, write KV memory, attend over pages.

T tokens of R rows; Hq query and Hkv key heads of size D on this rank; R also names rotary dimensions where it
stands beside D.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from srt.layers.batch import ForwardBatch, KVLayer

COMPILING: Final = "compiling attention"
"""Name of the thread in which a backend compiles what it can do without until then."""


def one() -> Tensor:
    """A scale that changes nothing."""
    return torch.ones(())


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention on this rank. Query head h reads key head h // (q_heads / kv_heads)."""

    layer: int
    group: int
    """Index of its KV group in the batch's page tables and slots."""
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    window: int | None
    """A query at position i sees keys j with 0 <= i - j < window; None: all j <= i."""
    scale: float
    q_norm: Tensor
    """[D] gamma - 1 in the model's dtype, one vector for all heads."""
    k_norm: Tensor
    rope: Tensor
    """[positions, rotary_dim] float32: cosines, then sines."""
    eps: float
    k_scale: Tensor = field(default_factory=one)
    """[] float32: with KV memory in FP8, a stored key stands for code * k_scale. 1 where no checkpoint says so."""
    v_scale: Tensor = field(default_factory=one)


class AttentionBackend(Protocol):
    """Attention over paged KV memory."""

    def begin(self, batch: ForwardBatch) -> None:
        """Prepare for a step; called once, before any layer of it."""
        ...

    def store(self, qkv: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        """Normalise and rotate q and k, write k and v to their slots, return q.

        Shapes: qkv [T, (Hq + 2 Hkv) * D], rows may be strided; q [T, Hq, D].
        q and k are normalised over D (float32, gain 1 + weight) before the first R dimensions are rotated.
        KV memory of dtype float8_e4m3fn gets codes of k / k_scale and v / v_scale, saturated at 448.
        """
        ...

    def attend(self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        """Causal attention of each row's tokens over the row's pages, each head times the sigmoid of its gate.

        Shapes: q [T, Hq, D]; gates [T, Hq] before the sigmoid, rows may be strided; result [T, Hq * D].
        """
        ...
