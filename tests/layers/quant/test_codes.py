"""Every code, every tie, every sign of the two small number formats."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srt.layers.quant.codes import (
    E2M1_MAGNITUDES,
    decode_e2m1,
    encode_e2m1,
    encode_e4m3,
    pack_nibbles,
    unpack_nibbles,
)


def _e4m3_value(byte: int) -> Fraction | None:
    """The number of an e4m3 byte by the definition of the format; None for NaN."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, byte >> 3 & 0xF, byte & 7
    if byte & 0x7F == 0x7F:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(1, 64)
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


E4M3 = {byte: value for byte in range(256) if (value := _e4m3_value(byte)) is not None}
POSITIVE = [(E4M3[byte], byte) for byte in range(0x7F)]


def _encode(value: float) -> int:
    return int(encode_e4m3(torch.tensor([value])).view(torch.uint8)[0])


def test_each_of_the_256_e4m3_bytes_decodes_to_the_number_of_its_definition() -> None:
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    for byte, value in enumerate(decoded):
        assert Fraction(value) == E4M3[byte] if byte in E4M3 else value != value


def test_each_e4m3_number_encodes_to_its_own_byte() -> None:
    for byte, value in E4M3.items():
        assert _encode(-0.0 if byte == 0x80 else float(value)) == byte


def test_an_e4m3_tie_goes_to_the_even_byte_and_a_hair_beyond_it_goes_to_the_nearer_one() -> None:
    for (low, low_byte), (high, high_byte) in pairwise(POSITIVE):
        middle = float((low + high) / 2)
        even = low_byte if low_byte % 2 == 0 else high_byte
        tie = torch.tensor(middle)
        below, above = (float(torch.nextafter(tie, torch.tensor(end))) for end in (-1e9, 1e9))
        for sign, bit in ((1.0, 0), (-1.0, 0x80)):
            assert _encode(sign * middle) == even | bit
            assert _encode(sign * below) == low_byte | bit
            assert _encode(sign * above) == high_byte | bit


@pytest.mark.parametrize("value", [448.0, 449.0, 464.0, 480.0, 1e30, float("inf")])
def test_e4m3_saturates_at_448_on_both_sides(value: float) -> None:
    assert (_encode(value), _encode(-value)) == (0x7E, 0xFE)


def test_each_of_the_16_e2m1_codes_decodes_to_its_number_and_encodes_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode_e2m1(codes)
    assert values.tolist() == [*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES)]
    assert encode_e2m1(values).tolist() == codes.tolist()
    assert torch.signbit(values[8]), "code 8 is minus zero"


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (6.0, 6.0), (9.0, 6.0)],
)
def test_an_e2m1_tie_goes_where_the_format_says_on_both_sides_of_zero(value: float, rounded: float) -> None:
    assert decode_e2m1(encode_e2m1(torch.tensor([value, -value]))).tolist() == [rounded, -rounded]


def test_a_hair_beside_an_e2m1_tie_goes_to_the_nearer_number() -> None:
    for low, high in pairwise(E2M1_MAGNITUDES):
        tie = torch.tensor((low + high) / 2)
        beside = torch.stack([torch.nextafter(tie, torch.tensor(end)) for end in (-9.0, 9.0)])
        assert decode_e2m1(encode_e2m1(beside)).tolist() == [low, high]


@given(st.floats(width=32, allow_nan=False))
def test_no_e2m1_number_is_nearer_than_the_chosen_one(value: float) -> None:
    chosen = float(decode_e2m1(encode_e2m1(torch.tensor([value])))[0])
    reachable = min(max(value, -6.0), 6.0)
    assert abs(chosen - reachable) == min(abs(sign * m - reachable) for m in E2M1_MAGNITUDES for sign in (1, -1))


@given(st.floats(width=32, allow_nan=False))
def test_no_e4m3_number_is_nearer_than_the_chosen_one(value: float) -> None:
    chosen = Fraction(float(encode_e4m3(torch.tensor([value])).float()[0]))
    reachable = Fraction(min(max(value, -448.0), 448.0))
    assert abs(chosen - reachable) == min(abs(number - reachable) for number in E4M3.values())


def test_the_low_nibble_is_the_first_number() -> None:
    codes = unpack_nibbles(torch.tensor([0x72], dtype=torch.uint8))
    assert decode_e2m1(codes).tolist() == [1.0, 6.0]
    assert pack_nibbles(codes).tolist() == [0x72]


def test_all_256_bytes_survive_unpacking_and_packing() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert pack_nibbles(unpack_nibbles(every)).tolist() == every.tolist()
