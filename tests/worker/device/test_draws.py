"""Draws on the device against those of the host: in plain torch, and in kernels, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srt.layers.ops import TorchOps
from srt.messages import RowStart, SamplingSpec
from srt.worker import sampler as host
from srt.worker.device import sampler as device
from srt.worker.device.fused_sampler import FusedSampler
from srt.worker.device.layout import layout_of, upload
from srt.worker.device.rows import DeviceRows, DeviceStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Batch:
    """Rows with one wanted logits each, out of more rows than there are in the batch."""

    specs: list[SamplingSpec]
    positions: list[int]
    rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [(3 * at + 1) % (len(self.specs) + 3) for at in range(len(self.specs))]
        self.rows = np.random.default_rng(len(self.specs)).permutation(len(self.specs) + 2)[: len(self.specs)].tolist()

    def step(self) -> DeviceStep:
        """Rows that know as many tokens as their next one's position says."""
        count = len(self.specs)
        rows = DeviceRows(DEVICE, 1, 4, 8, count + 2)
        rows.state[self.rows, 1] = torch.tensor(self.positions, device=DEVICE)
        rows.state[self.rows, 0] = torch.tensor(self.positions, device=DEVICE) - 1
        ones = np.ones(count, np.int64)
        return rows.begin(layout_of(np.array(self.rows), ones, ones.astype(np.bool_), ones * 0, DEVICE))

    def sample(self, sampler: device.Sampler, logits: Tensor) -> list[int]:
        """What a sampler of the device says."""
        sampling = device.RowSampling(DEVICE, len(self.specs) + 2)
        sampling.apply([RowStart(row, b"", 0, 0, spec) for row, spec in zip(self.rows, self.specs, strict=True)])
        filtered = sampling.filtered(self.rows)
        with np.errstate(over="ignore"):
            tokens, _ = sampler.sample(logits.to(DEVICE), self.step(), sampling.settings, filtered=filtered)
        return tokens.tolist()

    def on_host(self, logits: Tensor) -> list[int]:
        """What the host says."""
        specs = self.specs
        columns = host.SamplingColumns(
            temperature=np.array([spec.temperature for spec in specs]),
            top_k=np.array([spec.top_k for spec in specs]),
            top_p=np.array([spec.top_p for spec in specs]),
            min_p=np.array([spec.min_p for spec in specs]),
            seed=np.array([spec.seed & 0xFFFF_FFFF_FFFF_FFFF for spec in specs], np.uint64),
            position=np.array(self.positions),
        )
        finite = torch.where(logits.isfinite(), logits, -3e38) if logits.dtype == torch.float32 else logits
        return host.sample(finite.clone(), columns, TorchOps()).tolist()


def some_spec(generator: np.random.Generator) -> SamplingSpec:
    return SamplingSpec(
        temperature=float(generator.choice([0.0, 0.01, 0.3, 0.77, 1.0, 2.0, 50.0])),
        top_k=int(generator.choice([0, 0, 1, 5, 50, 999, 1000, 4000])),
        top_p=float(generator.choice([0.0, 0.2, 0.5, 0.9, 0.95, 1.0, 1.0])),
        min_p=float(generator.choice([0.0, 0.0, 0.05, 1.0])),
        seed=int(generator.integers(0, 1 << 63)) * 2 + 1,
    )


def logits_of(generator: np.random.Generator, rows: int, size: int, kind: str) -> Tensor:
    found = torch.from_numpy(generator.standard_normal((rows, size)).astype(np.float32) * 3)
    if kind == "tied":
        found = (found * 2).round() / 2
    if kind == "flat":
        found = found * 0 + 1
    if kind == "peaked":
        found[:, size // 3] += 30
    if kind == "bfloat16":
        found = found.bfloat16()
    if kind == "masked":
        found[torch.from_numpy(generator.random((rows, size)) < 0.7)] = -torch.inf
        found[:, 0] = 0.0
    return found


KINDS = ["random", "tied", "flat", "peaked", "bfloat16", "masked"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [512, 64])
def test_kernels_draw_what_the_host_draws(kind: str, tile: int) -> None:
    generator = np.random.default_rng(KINDS.index(kind))
    for size in (1000, 7, 513):
        rows = 12
        batch = Batch([some_spec(generator) for _ in range(rows)], generator.integers(1, 10_000, rows).tolist())
        logits = logits_of(generator, rows, size, kind)
        assert batch.sample(FusedSampler(columns=128, tile=tile), logits) == batch.on_host(logits)
