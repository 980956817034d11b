"""The shape of a step: all that follows from its plan alone, and nothing of what the rows hold.

Two steps of one shape can share a layout. That is what a recorded graph needs: a layout that stays, and rows that
change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.messages import StepPlan

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """R rows of which E sample; T tokens, L wanted logits. Tensors are int64 on the device unless it says otherwise.

    A row has `widths` tokens: `counts` that it knows, and `drafts` guesses behind them if it samples.
    """

    changing: Tensor
    """[R + E] memory of `rows` and `drafts`: what may be written between steps, in one copy."""
    rows: Tensor
    """[R] row numbers."""
    counts: Tensor
    """[R]."""
    widths: Tensor
    """[R]."""
    drafts: Tensor
    """[E] guesses that may be checked, up to what the widths have room for."""
    emits: Tensor
    """[E] which of the R rows sample."""
    token_rows: Tensor
    """[T] which of the R rows a token belongs to."""
    offsets: Tensor
    """[T] place of a token within its row's tokens."""
    query_starts: Tensor
    """[R + 1] int32."""
    wanted: Tensor
    """[L] which of the T tokens have wanted logits: the last `drafts + 1` of each row that samples."""
    wanted_rows: Tensor
    """[L] which of the E rows they belong to."""
    wanted_offsets: Tensor
    """[L] place within them: 0 for the logits behind the last known token."""
    firsts: Tensor
    """[E] where a row's logits begin among the L."""
    query_starts_list: list[int]
    host_emits: Ints
    """`emits` on the host."""
    host_drafts: Ints
    """[E] the most guesses that the widths have room for."""

    @property
    def depth(self) -> int:
        """The most guesses of a row."""
        return int(self.host_drafts.max(initial=0))

    @property
    def host_firsts(self) -> Ints:
        """`firsts` on the host."""
        firsts: Ints = np.cumsum(self.host_drafts + 1) - (self.host_drafts + 1)
        return firsts

    @property
    def host_widths(self) -> Ints:
        """[R] on the host."""
        return np.diff(np.array(self.query_starts_list))

    @property
    def tokens(self) -> int:
        """T."""
        return self.query_starts_list[-1]


def layout_of(rows: Ints, counts: Ints, emits: NDArray[np.bool_], drafts: Ints, device: torch.device) -> Layout:
    """Layout of rows with these counts; `drafts` are those of the rows that sample. One copy to the device."""
    emitting = np.flatnonzero(emits)
    widths = counts.copy()
    widths[emitting] += drafts
    ends = np.cumsum(widths)
    starts = np.concatenate([[0], ends])
    logits = drafts + 1
    wanted_offsets = offsets_within(logits)
    firsts = np.cumsum(logits) - logits
    columns = [
        np.concatenate([rows, drafts]),
        counts,
        widths,
        emitting,
        np.repeat(np.arange(len(rows)), widths),
        offsets_within(widths),
        starts,
        np.repeat(ends[emitting] - logits, logits) + wanted_offsets,
        np.repeat(np.arange(len(emitting)), logits),
        wanted_offsets,
        firsts,
    ]
    (changing, counts_, widths_, emits_, token_rows, offsets, starts_, wanted, wanted_rows, places, firsts_) = upload(
        columns, device
    )
    rows_, drafts_ = changing.split([len(rows), len(drafts)])
    return Layout(
        changing=changing, rows=rows_, counts=counts_, widths=widths_, drafts=drafts_, emits=emits_,
        token_rows=token_rows, offsets=offsets, query_starts=starts_.int(), wanted=wanted, wanted_rows=wanted_rows,
        wanted_offsets=places, firsts=firsts_, query_starts_list=starts.tolist(), host_emits=emitting,
        host_drafts=drafts,
    )  # fmt: skip


def layout_of_plan(plan: StepPlan, device: torch.device) -> Layout:
    """Layout of a plan."""
    emits = np.array(plan.emits, np.bool_)
    drafts = np.array(plan.drafts, np.int64)[emits] if plan.drafts else np.zeros(int(emits.sum()), np.int64)
    return layout_of(np.array(plan.rows, np.int64), np.array(plan.counts, np.int64), emits, drafts, device)


def upload(columns: Sequence[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """Several columns of int64 in one copy that the host does not wait for."""
    packed = packed_for(columns, device).to(device, non_blocking=True)
    columns_: tuple[Tensor, ...] = packed.split([len(column) for column in columns])
    return columns_


def packed_for(columns: Sequence[Ints], device: torch.device) -> Tensor:
    """Several columns of int64 behind each other on the host, where a copy to this device needs no waiting."""
    packed = torch.from_numpy(np.concatenate(columns))
    return packed.pin_memory() if device.type == "cuda" else packed


def offsets_within(counts: Ints) -> Ints:
    """[0, 1, .., counts[0] - 1, 0, 1, ..]: the place of each item within its run."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Ints = np.arange(total) - np.repeat(ends - counts, counts)
    return offsets
