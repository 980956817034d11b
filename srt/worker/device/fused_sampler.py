"""Draws in a few Triton kernels, without sorting: `srt/worker/device/draw_kernels.py` says how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from srt.layers.cuda.launch import Launch
from srt.layers.cuda.ops import LOGIT_COLUMNS
from srt.layers.cuda.small_kernels import block_max_kernel
from srt.layers.gpu import Gpu
from srt.worker.device import draw_kernels as kernels
from srt.worker.device.rows import DeviceStep
from srt.worker.device.sampler import Settings

TILE: Final = 8192
"""Logits that one program looks through at once for a row's cut."""


@dataclass(frozen=True)
class Asked:
    """What all kernels of a draw are given."""

    logits: Tensor
    values: Tensor
    """[L, blocks] float32: the largest logit of each block."""
    step: DeviceStep
    settings: Settings

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """In the order of the kernels' parameters."""
        layout = self.step.layout
        return self.logits, self.logits.stride(0), self.values, layout.rows, layout.emits, layout.wanted_rows


class FusedSampler:
    """`Sampler` on a GPU with Triton."""

    def __init__(self, gpu: Gpu | None = None, columns: int = LOGIT_COLUMNS, tile: int = TILE) -> None:
        """`columns`: logits of a block, one program's; `tile`: as `TILE`. Both powers of two."""
        self._launch = Launch(gpu)
        self._columns, self._tile = columns, tile

    def sample(self, logits: Tensor, step: DeviceStep, settings: Settings, *, filtered: bool) -> tuple[Tensor, Tensor]:
        """As `Sampler` says."""
        items, size = logits.shape
        blocks = triton.cdiv(size, self._columns)
        sizes = {"SIZE": size, "BLOCK": self._columns, "COUNT": blocks, "PADDED": triton.next_power_of_2(blocks)}
        out = logits.new_empty(items, dtype=torch.int64)
        finite = logits.new_empty(items, dtype=torch.int32)
        values = logits.new_empty(items, blocks, dtype=torch.float32)
        places = logits.new_empty(items, blocks, dtype=torch.int32)
        block_max_kernel[items, blocks](
            logits, logits.stride(0), values, places, SIZE=size, BLOCK=self._columns, num_warps=8, **self._launch
        )
        asked = Asked(logits, values, step, settings)
        cuts, ties = self._cut(asked, sizes) if filtered else (values, places)
        sums = logits.new_empty(items, blocks, dtype=torch.int64)
        equals = torch.empty_like(sums) if filtered else sums
        kernels.sum_kernel[items, blocks](
            *asked.arguments, settings.reals, cuts, sums, equals, FILTERED=filtered, **sizes, num_warps=8,
            **self._launch,
        )  # fmt: skip
        layout = step.layout
        kernels.pick_kernel[items,](
            *asked.arguments[:3], places, *asked.arguments[3:], layout.wanted_offsets, step.known, settings.words,
            settings.reals, cuts, ties, sums, equals, out, finite, FILTERED=filtered, **sizes, num_warps=8,
            **self._launch,
        )  # fmt: skip
        return out, finite

    def _cut(self, asked: Asked, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
        """What top_k and top_p leave of each row: the distance of the last kept, [L] float32, and how many of the
        tokens at that distance are kept, [L] int64."""
        logits, blocks = asked.logits, sizes["COUNT"]
        items, rounds, levels = len(logits), kernels.ROUNDS.value, kernels.LEVELS.value
        room = self._tile // sizes["PADDED"]
        edges = logits.new_empty(rounds, items, levels, dtype=torch.float32)
        held = logits.new_empty(rounds, items, blocks, levels, dtype=torch.int64)
        numbers = logits.new_empty(items, blocks, levels, dtype=torch.int32)
        bands = logits.new_empty(rounds + 1, items, 2, dtype=torch.float32)
        marks = logits.new_empty(rounds + 1, items, 3, dtype=torch.int64)
        kept = logits.new_empty(items, blocks, room, dtype=torch.float32)
        counts = logits.new_empty(items, blocks, dtype=torch.int32)
        cuts, ties = logits.new_empty(items, dtype=torch.float32), logits.new_empty(items, dtype=torch.int64)
        given = *asked.arguments, asked.settings.words, asked.settings.reals
        narrowed = edges, held, numbers, bands, marks, counts, items
        for number in range(rounds):
            kernels.narrow_kernel[items, blocks](
                *given, *narrowed, ROOM=room, ROUND=number, **sizes, num_warps=8, **self._launch
            )
        kernels.gather_kernel[items, blocks](*given, *narrowed, kept, ROOM=room, **sizes, num_warps=8, **self._launch)
        whole = {name: size for name, size in sizes.items() if name != "BLOCK"}
        kernels.cut_kernel[items,](
            *given, bands, marks, items, kept, counts, cuts, ties, ROOM=room, **whole, num_warps=16, **self._launch
        )
        return cuts, ties
