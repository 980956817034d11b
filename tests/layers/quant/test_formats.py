"""The weight formats against their definitions, written out in the plainest way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srt.layers.quant.codes import decode_e2m1, unpack_nibbles
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import BLOCK_SCALE, Fp8Blocks, decode_tokens, encode_tokens
from srt.layers.quant.nvfp4 import GROUP_SCALE, INPUT_SCALE, MATRIX_SCALE, Nvfp4, encode_groups, unscaled_groups
from srt.layers.quant.plain import Plain

FORMATS: list[WeightFormat] = [Plain(torch.bfloat16), Plain(torch.float32), Fp8Blocks(), Nvfp4(), Nvfp4(inputs=False)]


def _weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(192, 128), (3, 40, 272), (256, 384)])
def test_what_is_stored_has_the_shapes_and_dtypes_that_the_format_announces(
    weight_format: WeightFormat, shape: tuple[int, ...]
) -> None:
    stored = weight_format.pack(_weight(*shape))
    assert stored.shape == shape
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.tensors.items()} == {
        key: (grid.dtype, grid.shape(shape)) for key, grid in weight_format.grids().items()
    }
    assert weight_format.unpack(stored).shape == shape


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_encoding_what_was_decoded_gives_the_same_numbers_again(weight_format: WeightFormat) -> None:
    once = weight_format.unpack(weight_format.pack(_weight(2, 160, 256)))
    twice = weight_format.unpack(weight_format.pack(once))
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_a_stack_is_encoded_matrix_by_matrix(weight_format: WeightFormat) -> None:
    weight = _weight(3, 32, 128) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    stacked = weight_format.pack(weight)
    for index in range(3):
        alone = weight_format.pack(weight[index])
        for key, tensor in stacked[index].tensors.items():
            assert torch.equal(tensor.float(), alone.tensors[key].float()), key


@pytest.mark.parametrize(("weight_format", "error"), [(FORMATS[0], 2e-3), (FORMATS[2], 0.03), (FORMATS[3], 0.11)])
def test_the_error_of_normal_weights_is_what_the_width_of_the_codes_allows(
    weight_format: WeightFormat, error: float
) -> None:
    weight = _weight(256, 512)
    decoded = weight_format.unpack(weight_format.pack(weight))
    assert float((decoded - weight).norm() / weight.norm()) < error


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(weight_format: WeightFormat, bad: float) -> None:
    weight = _weight(128, 128)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="1 of 16384 values are not finite"):
        weight_format.pack(weight)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e30, 3e38])
def test_zeros_and_extreme_weights_encode_to_finite_numbers(weight_format: WeightFormat, scale: float) -> None:
    weight = torch.linspace(-1, 1, 128 * 128).view(128, 128) * scale
    decoded = weight_format.unpack(weight_format.pack(weight))
    assert bool(torch.isfinite(decoded).all())
    assert (decoded.abs() <= 1.01 * max(scale, 1e-40)).all()


def test_fp8_decodes_a_number_with_the_scale_of_its_block() -> None:
    stored = Fp8Blocks().pack(_weight(200, 300))
    decoded, scales = Fp8Blocks().unpack(stored), stored.tensors[BLOCK_SCALE]
    assert scales.shape == (2, 3)
    for row, column in [(0, 0), (127, 127), (128, 127), (127, 128), (199, 299), (128, 256)]:
        code = float(stored.weight[row, column].float())
        assert float(decoded[row, column]) == float(torch.tensor(code) * scales[row // 128, column // 128])


def test_fp8_uses_its_whole_range_in_every_block() -> None:
    codes = Fp8Blocks().pack(_weight(256, 256)).weight.float().abs()
    assert all(float(codes[r : r + 128, c : c + 128].max()) == 448.0 for r in (0, 128) for c in (0, 128))


def test_fp8_activations_have_a_scale_for_each_token_and_128_columns() -> None:
    x = _weight(5, 300)
    codes, scales = encode_tokens(x)
    assert scales.shape == (5, 3)
    for token in range(5):
        for block in range(3):
            part = x[token, 128 * block : 128 * (block + 1)]
            assert float(scales[token, block]) == float(part.abs().max() / 448)
    assert float((decode_tokens(codes, scales) - x).norm() / x.norm()) < 0.03


def test_the_product_of_fp8_operands_is_the_sum_of_products_of_codes_times_both_scales() -> None:
    x, stored = _weight(3, 256, seed=1), Fp8Blocks().pack(_weight(130, 256))
    codes, scales = encode_tokens(x)
    expected = torch.zeros(3, 130, dtype=torch.float64)
    for row in range(130):
        for block in range(2):
            part = slice(128 * block, 128 * (block + 1))
            partial = codes[:, part].double() @ stored.weight[row, part].double()
            expected[:, row] += partial * scales[:, block] * stored.tensors[BLOCK_SCALE][row // 128, block]
    torch.testing.assert_close(Fp8Blocks().matmul_coded(x, stored).double(), expected, rtol=1e-5, atol=1e-5)


def test_nvfp4_decodes_a_number_from_code_group_scale_and_matrix_scale() -> None:
    stored = Nvfp4().pack(_weight(2, 24, 64))
    decoded = Nvfp4().unpack(stored)
    codes = decode_e2m1(unpack_nibbles(stored.weight))
    for matrix, row, column in [(0, 0, 0), (1, 23, 63), (0, 7, 16), (1, 5, 15)]:
        group = float(stored.tensors[GROUP_SCALE][matrix, row, column // 16].float())
        scale = stored.tensors[MATRIX_SCALE][matrix, 0]
        assert float(decoded[matrix, row, column]) == float(codes[matrix, row, column] * group * scale)


def test_the_largest_magnitude_of_an_nvfp4_matrix_is_2688_times_its_matrix_scale() -> None:
    weight = _weight(32, 64)
    stored = Nvfp4().pack(weight)
    assert float(stored.tensors[MATRIX_SCALE]) == float(weight.abs().max() / 2688)
    assert float(stored.tensors[GROUP_SCALE].float().max()) == 448.0


def test_rows_of_stacked_parts_take_the_matrix_scale_of_their_part() -> None:
    gate, up = Nvfp4().pack(_weight(2, 16, 32)), Nvfp4().pack(100 * _weight(2, 16, 32, seed=1))
    keys = gate.tensors.keys()
    joined = {key: torch.cat([gate.tensors[key], up.tensors[key]], dim=1) for key in keys}
    both = Nvfp4().unpack(StoredWeight((2, 32, 32), joined))
    assert torch.equal(both, torch.cat([Nvfp4().unpack(gate), Nvfp4().unpack(up)], dim=1))


def test_nvfp4_activations_follow_the_formula_with_the_calibrated_scale() -> None:
    x, scale = _weight(4, 48), torch.tensor(0.0011)
    codes, groups = encode_groups(x, scale)
    outer = 1 / scale
    for token in range(4):
        for group in range(3):
            part = x[token, 16 * group : 16 * (group + 1)]
            block = (part.abs().max() / 6 * outer).clamp(max=448).to(torch.float8_e4m3fn).float()
            assert float(groups[token, group].float()) == float(block)
            nearest = part * outer / block
            decoded = decode_e2m1(codes[token, 16 * group : 16 * (group + 1)])
            assert (decoded - nearest).abs().max() <= 1.0


def test_activations_beyond_the_calibrated_range_saturate() -> None:
    x = torch.full((1, 16), 1e6)
    codes, groups = encode_groups(x, torch.tensor(1.0))
    assert unscaled_groups(codes, groups).tolist() == [[2688.0] * 16]


def test_the_product_of_nvfp4_operands_uses_the_largest_input_scale() -> None:
    x, stored = _weight(3, 64, seed=1), Nvfp4().pack(_weight(16, 64))
    wide = StoredWeight(stored.shape, {**stored.tensors, INPUT_SCALE: torch.tensor([0.0007, 0.0015])})
    codes, groups = encode_groups(x, torch.tensor(0.0015))
    expected = (unscaled_groups(codes, groups) * 0.0015).double() @ Nvfp4().unpack(stored).double().T
    torch.testing.assert_close(Nvfp4().matmul_coded(x, wide).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_the_product_with_plain_activations_is_that_of_the_decoded_weight(weight_format: WeightFormat) -> None:
    x, stored = _weight(5, 128, seed=2), weight_format.pack(_weight(64, 128))
    expected = x.double() @ weight_format.unpack(stored).double().T
    torch.testing.assert_close(weight_format.matmul(x, stored).double(), expected, rtol=1e-5, atol=1e-5)


def test_nvfp4_refuses_columns_that_leave_a_group_incomplete() -> None:
    with pytest.raises(ValueError, match="40 columns do not divide into groups of 16"):
        Nvfp4().pack(_weight(8, 40))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31), st.floats(-12, 12))
def test_no_nvfp4_number_is_off_by_more_than_its_group_allows(rows: int, groups: int, seed: int, power: float) -> None:
    weight = _weight(rows, 16 * groups, seed=seed) * 10.0**power
    decoded = Nvfp4().unpack(Nvfp4().pack(weight))
    largest = torch.unflatten(weight, -1, (-1, 16)).abs().amax(-1, keepdim=True)
    # Half the widest gap between codes (1 of 6) of the group's largest, 1/16 for the rounding of the group scale,
    # and the least group scale (2^-10 of 448 to either side) for groups that are small against the matrix.
    allowed = largest * (1 / 6 + 1 / 16) + weight.abs().max() * 6 / 2688 * 2**-9
    assert (torch.unflatten((decoded - weight), -1, (-1, 16)).abs() <= allowed).all()
