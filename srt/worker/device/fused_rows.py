"""Rows whose small steps are read and written by one Triton kernel each."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from srt.layers.batch import ForwardBatch
from srt.worker.device import row_kernels as kernels
from srt.worker.device.layout import Layout
from srt.worker.device.rows import DeviceOutcome, DeviceRows, DeviceStep

MOST_TOKENS: Final = 1024
"""Of a step that one program reads."""


class FusedRows(DeviceRows):
    """`DeviceRows` on a GPU with Triton."""

    def begin(self, layout: Layout) -> DeviceStep:
        """What a layout means now."""
        rows, emits, tokens = len(layout.rows), len(layout.emits), layout.tokens
        if max(tokens, rows) > MOST_TOKENS:
            return super().begin(layout)
        long = torch.empty(2 * tokens + rows + 2 * emits + 1, dtype=torch.int64, device=self.device)
        ids, positions, starts, known, drafted, fault = long.split([tokens, tokens, rows, emits, emits, 1])
        slots = torch.empty(len(self.tables), tokens, dtype=torch.int64, device=self.device)
        kv_lens = torch.empty(rows, dtype=torch.int32, device=self.device)
        kernels.begin_kernel[1,](
            layout.rows, layout.counts, layout.widths, layout.drafts, layout.emits, layout.token_rows, layout.offsets,
            self.state, self.tokens, self.tokens.stride(0), self.tables, self.tables.stride(0), self.tables.stride(1),
            self.context_length - 1, starts, kv_lens, known, drafted, fault, ids, positions, slots,
            R=rows, E=emits, T=tokens, GROUPS=len(self.tables), PAGE=self.page_size, **_room(max(tokens, rows)),
        )  # fmt: skip
        batch = ForwardBatch(
            input_ids=ids, positions=positions, query_starts=layout.query_starts,
            query_starts_list=layout.query_starts_list, kv_lens=kv_lens, kv_lens_list=None,
            page_tables=self.tables.unbind(), slots=slots.unbind(), logit_tokens=layout.wanted,
            page_size=self.page_size, table_rows=layout.rows,
        )  # fmt: skip
        return DeviceStep(layout, starts, known, drafted, fault[0], batch)

    def end(self, step: DeviceStep, sampled: Tensor, finite: Tensor) -> DeviceOutcome:
        """A step is done: what its emitting rows sampled are their next tokens, as far as the guesses agreed."""
        layout = step.layout
        rows, wanted = len(layout.rows), len(layout.wanted)
        if len(layout.emits) < rows or wanted > MOST_TOKENS:
            return super().end(step, sampled, finite)
        columns = torch.empty(3, rows, dtype=torch.int64, device=self.device)
        report = torch.empty(wanted + 2 * rows + 1, dtype=torch.int64, device=self.device)
        kernels.end_kernel[1,](
            layout.rows, layout.counts, layout.firsts, step.starts, step.known, step.drafted, step.fault, sampled,
            finite, self.state, self.tokens, self.tokens.stride(0), self.nobody, columns[0], columns[1], columns[2],
            report, R=rows, WANTED=wanted, DEPTH=max(self.drafts, layout.depth) if layout.depth else 0, **_room(wanted),
        )  # fmt: skip
        computed, known, accepted = columns.unbind()
        return DeviceOutcome(step, computed, known, accepted, report)


def _room(number: int) -> dict[str, int]:
    """Room for so many lines: one of three sizes, or each number would be compiled for."""
    most = next(size for size in (16, 256, MOST_TOKENS) if size >= number)
    return {"MOST": most, "num_warps": 4 if most == 16 else 8}
