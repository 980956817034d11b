"""Masks on logits: what is not allowed becomes minus infinity, and a row with nothing left is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srt.worker.masks import Masks, _barred

SIZE = 77


@pytest.mark.parametrize("rows", [[1, 2], [0, 3], [2]])
def test_only_allowed_tokens_of_masked_rows_are_left(rows: list[int]) -> None:
    rng = np.random.default_rng(1)
    allowed = rng.random((len(rows), SIZE)) < 0.3
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, 96 - SIZE))), axis=1, bitorder="little").view(np.int32)
    logits = torch.from_numpy(rng.normal(size=(4, SIZE)).astype(np.float32))
    wanted = logits.clone()
    wanted[torch.tensor(rows)] = wanted[torch.tensor(rows)].masked_fill(~torch.from_numpy(allowed), -torch.inf)
    masks = Masks(np.array(rows), bits)
    masks.apply(logits)
    assert torch.equal(logits, wanted)
    assert not masks.empty.any()


def test_bits_are_read_alike_on_the_host_and_on_devices() -> None:
    bits = np.random.default_rng(2).integers(-(2**31), 2**31, (3, 3), dtype=np.int64).astype(np.int32)
    on_host = _barred(bits, SIZE, torch.device("cpu"))
    on_device = _barred(bits, SIZE, torch.device("meta"))
    assert on_host.shape == on_device.shape
    words = torch.from_numpy(bits)
    ones = (words[:, :, None] >> torch.arange(32)) & 1
    assert torch.equal(on_host, ones.view(3, -1)[:, :SIZE] == 0)


def test_a_row_with_nothing_left_is_told_and_stays_finite() -> None:
    logits = torch.zeros(2, SIZE)
    logits[1, 5] = -torch.inf
    bits = np.zeros((2, 3), np.int32)
    bits[0, 0] = 1
    bits[1, 0] = 1 << 5
    masks = Masks(np.array([0, 1]), bits)
    masks.apply(logits)
    assert masks.empty.tolist() == [False, True]
    assert logits[1].isfinite().all()
