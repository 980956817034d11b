"""Draws on the device against those of the host: in plain torch, and in kernels, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

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
SPARE = 2
"""Rows that are not in a batch."""


@dataclass(frozen=True)
class Batch:
    """Rows with one wanted logits each, in no order."""

    specs: list[SamplingSpec]
    positions: list[int]

    @property
    def rows(self) -> list[int]:
        """Row numbers."""
        count = len(self.specs)
        order = np.random.default_rng(count).permutation(count + SPARE)
        return [int(row) for row in order[:count]]

    def step(self) -> DeviceStep:
        """Rows that know as many tokens as their next one's position says."""
        count = len(self.specs)
        rows = DeviceRows(DEVICE, 1, 4, 8, count + SPARE)
        known = torch.tensor(self.positions, device=DEVICE)
        rows.state[self.rows] = torch.stack([known - 1, known, known * 0], dim=1)
        ones = np.ones(count, np.int64)
        return rows.begin(layout_of(np.array(self.rows), ones, ones.astype(np.bool_), ones * 0, DEVICE))

    def sample(self, sampler: device.Sampler, logits: Tensor) -> list[int]:
        """What a sampler of the device says."""
        sampling = device.RowSampling(DEVICE, len(self.specs) + SPARE)
        sampling.apply([RowStart(row, b"", 0, 0, spec) for row, spec in zip(self.rows, self.specs, strict=True)])
        filtered = sampling.filtered(self.rows)
        with np.errstate(over="ignore", invalid="ignore"):  # NumPy interprets the kernels
            tokens, finite = sampler.sample(logits.to(DEVICE), self.step(), sampling.settings, filtered=filtered)
        assert finite.tolist() == logits.isfinite().all(dim=1).int().tolist()
        return tokens.tolist()

    def on_host(self, logits: Tensor) -> list[int]:
        """What the host says. It refuses infinite logits; the least finite one is as improbable."""
        specs = self.specs
        columns = host.SamplingColumns(
            temperature=np.array([spec.temperature for spec in specs]),
            top_k=np.array([spec.top_k for spec in specs]),
            top_p=np.array([spec.top_p for spec in specs]),
            min_p=np.array([spec.min_p for spec in specs]),
            seed=np.array([spec.seed & 0xFFFF_FFFF_FFFF_FFFF for spec in specs], np.uint64),
            position=np.array(self.positions),
        )
        finite = torch.where(logits.isfinite(), logits, -1e30)
        return host.sample(finite, columns, TorchOps()).tolist()


def some_spec(generator: np.random.Generator) -> SamplingSpec:
    return SamplingSpec(
        temperature=float(generator.choice([0.0, 1e-6, 0.3, 0.77, 1.0, 2.0, 50.0])),
        top_k=int(generator.choice([0, 0, 1, 5, 50, 300, 4000])),
        top_p=float(generator.choice([0.0, 0.2, 0.5, 0.9, 0.95, 1.0, 1.0])),
        min_p=float(generator.choice([0.0, 0.0, 0.05, 1.0])),
        seed=int(generator.integers(0, 1 << 63)) * 2 + 1,
    )


def logits_of(generator: np.random.Generator, rows: int, size: int, kind: str) -> Tensor:
    found = torch.from_numpy(generator.standard_normal((rows, size)).astype(np.float32) * 3)
    match kind:
        case "tied":
            return (found * 2).round() / 2
        case "flat":
            return torch.ones_like(found)
        case "peaked":
            found[:, size // 3] += 30
        case "bfloat16":
            return found.bfloat16()
        case "masked":
            found[torch.from_numpy(generator.random((rows, size)) < 0.7)] = -torch.inf
            found[:, 0] = 0.0
    return found


KINDS = ["normal", "tied", "flat", "peaked", "bfloat16", "masked"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_draws_what_the_host_draws(kind: str) -> None:
    generator = np.random.default_rng(KINDS.index(kind))
    for size in (1000, 7, 513):
        batch = Batch([some_spec(generator) for _ in range(64)], generator.integers(1, 10_000, 64).tolist())
        logits = logits_of(generator, 64, size, kind)
        assert batch.sample(device.TorchSampler(TorchOps()), logits) == batch.on_host(logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [512, 64, 16])
def test_kernels_draw_what_the_host_draws(kind: str, tile: int) -> None:
    """Large tiles have room for all logits at once, small ones not even for those that are left in the end."""
    generator = np.random.default_rng(KINDS.index(kind) + tile)
    for size in (300, 7):
        batch = Batch([some_spec(generator) for _ in range(4)], generator.integers(1, 10_000, 4).tolist())
        logits = logits_of(generator, 4, size, kind)
        assert batch.sample(FusedSampler(columns=64, tile=tile), logits) == batch.on_host(logits)


specs = st.builds(
    SamplingSpec,
    temperature=st.sampled_from([0.05, 0.5, 1.0, 1.3, 1e4]),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.0, 1.0),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-24, 24), min_size=1, max_size=40),
    st.lists(specs, min_size=1, max_size=3),
    st.integers(1, 1 << 20),
    st.sampled_from([8, 16, 64]),
)
def test_kernels_cut_ties_as_the_host_does(
    quarters: list[int], chosen: list[SamplingSpec], position: int, tile: int
) -> None:
    logits = torch.tensor([quarters] * len(chosen)).float() / 4
    batch = Batch(chosen, [position] * len(chosen))
    assert batch.sample(FusedSampler(columns=16, tile=tile), logits) == batch.on_host(logits)


@pytest.mark.parametrize("sampler", [device.TorchSampler(TorchOps()), FusedSampler(columns=64, tile=256)])
def test_places_behind_guesses_have_numbers_of_their_own(sampler: device.Sampler) -> None:
    """Rows that check 0, 2 and 1 guesses have 1, 3 and 2 wanted logits."""
    chosen = [SamplingSpec(temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 2, 3)]
    rows, known, drafts = np.array([2, 0, 3]), np.array([40, 7, 500]), np.array([0, 2, 1])
    state = DeviceRows(DEVICE, 1, 4, 512, 4, 2)
    state.state[torch.from_numpy(rows).to(DEVICE)] = torch.tensor([[at - 1, at, 2] for at in known.tolist()]).to(DEVICE)
    sampling = device.RowSampling(DEVICE, 4)
    sampling.apply([RowStart(int(row), b"", 0, 0, spec) for row, spec in zip(rows, chosen, strict=True)])
    ones = np.ones(3, np.int64)
    step = state.begin(layout_of(rows, ones, ones.astype(np.bool_), drafts, DEVICE))
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(6))
    tokens, _ = sampler.sample(logits.to(DEVICE), step, sampling.settings, filtered=True)
    each = Batch([chosen[at] for at in (0, 1, 1, 1, 2, 2)], [40, 7, 8, 9, 500, 501])
    assert tokens.tolist() == each.on_host(logits)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_told_and_harm_no_other_row(bad: float) -> None:
    specs = [
        SamplingSpec(temperature=1.0, top_k=k, top_p=p, seed=3) for k, p in ((0, 1.0), (5, 1.0), (0, 0.5), (5, 0.5))
    ]
    logits = torch.randn(8, 200, generator=torch.Generator().manual_seed(3))
    batch = Batch(specs * 2, [5] * 8)
    expected = batch.sample(FusedSampler(columns=64), logits)
    logits[::2, 130] = bad
    logits[2, :] = bad
    found = batch.sample(FusedSampler(columns=64), logits)
    assert found[1::2] == expected[1::2]
    assert all(0 <= token < 200 for token in found)


def test_numbers_on_the_device_are_those_of_the_host() -> None:
    generator = np.random.default_rng(5)
    seeds, positions = generator.integers(0, 1 << 63, 100, np.uint64) * 2 + 1, generator.integers(0, 10_000, 100)
    numbers = device.uniform(*upload([seeds.view(np.int64), positions], DEVICE))
    assert numbers.tolist() == host.uniform(seeds, positions).tolist()


def test_what_a_row_wants_changes_when_another_request_starts_on_it() -> None:
    sampling = device.RowSampling(DEVICE, 3)
    drawn = SamplingSpec(temperature=0.5, top_p=0.75, min_p=0.125, seed=(1 << 63) + 5)
    sampling.apply([RowStart(1, b"", 0, 0, drawn), RowStart(2, b"", 0, 0, SamplingSpec(temperature=0.0, top_k=9))])
    assert sampling.settings.reals[1, 2:].tolist() == [0.5, 0.75, 0.125]
    assert sampling.settings.words[1:, 0].tolist() == [0, 9, 0]
    assert sampling.settings.words[1, 1].item() == 5 - (1 << 63)
    assert sampling.greedy([0, 2]) and not sampling.greedy([0, 1])
    assert sampling.filtered([1]) and not sampling.filtered([0])
    sampling.apply([RowStart(1, b"", 0, 0, SamplingSpec(temperature=0.0))])
    assert sampling.greedy([1]) and sampling.settings.reals[1, 2].item() == 0.0
