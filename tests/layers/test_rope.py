"""Rotary frequencies of the published model, and the rotation itself."""

from __future__ import annotations

import pytest
import torch

from srt.configs.step3p7 import Llama3Scaling, RopeConfig
from srt.layers.rope import inverse_frequencies, rope_table, rotate

FULL = RopeConfig(5_000_000.0, 64, Llama3Scaling(2.0, 1.0, 32.0, 131_072))
SLIDING = RopeConfig(10_000.0, 128, None)
PUBLISHED = {0: 1.0, 1: 6.175287e-1, 13: 1.899081e-3, 14: 1.030196e-3, 21: 2.008033e-5, 31: 1.619358e-7}
RATIOS = {14: 0.878455, 15: 0.727538, 16: 0.634342, 17: 0.576791, 18: 0.541252, 19: 0.519305, 20: 0.505753, 21: 0.5}


def test_full_layers_stretch_long_wavelengths_and_blend_between() -> None:
    stretched = inverse_frequencies(FULL)
    plain = inverse_frequencies(RopeConfig(FULL.theta, FULL.rotary_dim, None))
    for at, ratio in RATIOS.items():
        assert (stretched[at] / plain[at]).item() == pytest.approx(ratio, abs=2e-6)
    assert torch.equal(stretched[:14], plain[:14])
    for at, frequency in PUBLISHED.items():
        assert stretched[at].item() == pytest.approx(frequency, rel=1e-6)


def test_sliding_layers_rotate_every_dimension_unscaled() -> None:
    frequencies = inverse_frequencies(SLIDING)
    assert len(frequencies) == 64
    assert frequencies[1].item() == pytest.approx(8.659644e-1, rel=1e-6)
    assert frequencies[63].item() == pytest.approx(1.154782e-4, rel=1e-6)


def test_a_table_has_cosines_then_sines_of_each_position() -> None:
    table = rope_table(SLIDING, 100)
    assert table.shape == (100, 128)
    assert table[0].tolist() == [1.0] * 64 + [0.0] * 64
    angle = 99 * inverse_frequencies(SLIDING)[5].double()
    assert table[99, 5].item() == pytest.approx(angle.cos().item(), abs=1e-5)
    assert table[99, 69].item() == pytest.approx(angle.sin().item(), abs=1e-5)


def test_dimension_j_pairs_with_j_plus_half_and_the_rest_passes_through() -> None:
    x = torch.arange(1.0, 7.0).view(1, 1, 6)
    quarter_turn = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert rotate(x, quarter_turn).flatten().tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0, 6.0]
