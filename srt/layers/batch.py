"""Everything that a forward pass may see of a step: T tokens of R rows, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlacedFeatures:
    """Features of images that stand in for embeddings of M of the step's tokens."""

    tokens: Tensor
    """[M] int64: which of the T tokens."""
    features: Tensor
    """[M, H], in the model's dtype."""


@dataclass(frozen=True)
class ForwardBatch:
    """One step. A row's tokens are consecutive, in order of position; `*_list` repeat a tensor on the host.

    Where the device alone knows how far rows are, `kv_lens_list` is None. A token at the front of a row that has no
    position (its row is shorter than its share of the batch) has position 0 and a slot in the null page; what is
    computed for it is finite and means nothing.

    Slots are places in a pool's flattened [pages * page_size] memory. One entry a KV group where it says so.
    """

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, from 0 in each sequence."""
    query_starts: Tensor
    """[R + 1] int32: row r has tokens [query_starts[r], query_starts[r + 1])."""
    query_starts_list: list[int]
    kv_lens: Tensor
    """[R] int32: keys of the row once this step has stored its own."""
    kv_lens_list: list[int] | None
    page_tables: tuple[Tensor, ...]
    """Per group [R, P] int32: page of logical page j, which holds positions [j * page_size, (j + 1) * page_size)."""
    slots: tuple[Tensor, ...]
    """Per group [T] int64: where this step's keys and values go."""
    logit_tokens: Tensor
    """[L] int64: the tokens whose logits are wanted."""
    page_size: int
    images: PlacedFeatures | None = None
    """None if no token of the step belongs to an image."""
    table_rows: Tensor | None = None
    """[R] int64: page tables hold more than this batch's rows, and these lines are theirs; None: line r is row r's."""


@dataclass(frozen=True)
class KVLayer:
    """KV memory of one layer on this rank: k and v [pages + 1, page_size, kv_heads, head_dim]; page 0 is null."""

    k: Tensor
    v: Tensor
