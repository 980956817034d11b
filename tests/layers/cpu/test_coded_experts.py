"""Native experts over FP8 and NVFP4 weights: what the codes stand for, exactly, at every batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from srt.layers.cpu.experts import CpuExperts
from srt.layers.cpu.kernels import Kernels
from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.ops import Choice
from srt.layers.quant.codes import E4M3, pack_nibbles
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import BLOCK_SCALE, Fp8Blocks
from srt.layers.quant.nvfp4 import GROUP_SCALE, MATRIX_SCALE, Nvfp4
from tests.layers.cpu.support import DTYPES, assert_close, random
from tests.layers.moe.support import error, lopsided, ragged_choice
from tests.support.experts import pack_plain

FORMATS: dict[str, WeightFormat] = {"fp8": Fp8Blocks(), "nvfp4": Nvfp4(), "nvfp4-a16": Nvfp4(inputs=False)}
SHAPES = [(8, 32, 128), (5, 144, 256), (4, 272, 128)]
"""(experts, hidden, width): hidden sizes with a block cut short, and with half a panel left over."""


def truth(weights: WeightFormat, stored: StoredExperts, shape: ExpertShape, x: Tensor, choice: Choice) -> Tensor:
    """The reference runner in float32 over the decoded weights."""
    reference = ReferenceExperts(weights)
    return reference.run(x.float(), choice, reference.pack(stored, shape)).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.2])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("experts", "hidden", "width"), SHAPES)
def test_coded_experts_equal_the_reference_on_the_decoded_weights(
    kernels: Kernels, dtype: torch.dtype, limit: float | None, name: str, experts: int, hidden: int, width: int
) -> None:
    weights, shape = FORMATS[name], ExpertShape(experts, hidden, width, limit)
    stored, runner = lopsided(weights, shape), CpuExperts(weights, kernels)
    assert runner.refuses(shape) is None
    packed = runner.pack(stored, shape)
    for tokens in (1, 7, 150):
        x, choice = random(tokens, hidden, dtype=dtype), ragged_choice(tokens, experts, 3)
        assert_close(runner.run(x, choice, packed), truth(weights, stored, shape, x, choice))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_plain_loops_compute_the_same_experts(portable: Kernels, dtype: torch.dtype, name: str) -> None:
    assert portable.vectors == "portable loops"
    weights, shape = FORMATS[name], ExpertShape(5, 144, 128, 0.3)
    stored, runner = lopsided(weights, shape), CpuExperts(weights, portable)
    x, choice = random(9, 144, dtype=dtype), ragged_choice(9, 5, 3)
    assert_close(runner.run(x, choice, runner.pack(stored, shape)), truth(weights, stored, shape, x, choice))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_token_alone_equals_the_token_in_any_batch(kernels: Kernels, dtype: torch.dtype, name: str) -> None:
    weights, shape = FORMATS[name], ExpertShape(6, 160, 128, None)
    runner = CpuExperts(weights, kernels)
    packed = runner.pack(lopsided(weights, shape), shape)
    gate_up, down = random(1, 48, 160, dtype=dtype), random(1, 160, 24, dtype=dtype)
    shared = pack_plain(runner_of(kernels, dtype), gate_up, down)
    x, choice = random(137, 160, dtype=dtype), ragged_choice(137, 6, 3)
    whole = runner.run_with_shared(x, lambda: choice, packed, shared)
    for size in (1, 2, 5, 37, 100):
        pieces = zip(*(torch.split(t, size) for t in (x, choice.ids, choice.weights)), strict=True)
        parts = [runner.run_with_shared(a, partial(Choice, b, c), packed, shared) for a, b, c in pieces]
        assert torch.equal(torch.cat(parts), whole), f"batches of {size}"


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_the_shared_expert_is_plain_and_added(kernels: Kernels, name: str) -> None:
    weights, shape = FORMATS[name], ExpertShape(4, 64, 128, None)
    stored, runner = lopsided(weights, shape), CpuExperts(weights, kernels)
    gate_up, down = StoredWeight((1, 48, 64), {"weight": random(1, 48, 64)}), random(1, 64, 24)
    shared = runner.pack_shared(
        StoredExperts(gate_up, StoredWeight((1, 64, 24), {"weight": down})), ExpertShape(1, 64, 24, 0.3)
    )
    x, choice = random(11, 64), ragged_choice(11, 4, 2)
    routed = runner.pack(stored, shape)
    nothing = Choice(torch.full((11, 1), 4, dtype=torch.int32), torch.ones(11, 1))
    alone = runner.run_with_shared(x, lambda: nothing, routed, shared)
    assert_close(
        runner.run_with_shared(x, lambda: choice, routed, shared), (runner.run(x, choice, routed) + alone).double()
    )


@pytest.mark.parametrize("name", ["bf16", *FORMATS])
def test_experts_of_other_ranks_add_nothing(kernels: Kernels, name: str) -> None:
    if name == "bf16":
        runner = runner_of(kernels, torch.float32)
        gate_up, down = random(3, 256, 64), random(3, 64, 128)
        packed = pack_plain(runner, gate_up, down)
    else:
        runner, shape = CpuExperts(FORMATS[name], kernels), ExpertShape(3, 64, 128, None, elsewhere=True)
        assert runner.refuses(shape) is None
        packed = runner.pack(lopsided(FORMATS[name], shape), shape)
    x = random(20, 64)
    ids = torch.randint(0, 4, (20, 2), dtype=torch.int32)
    shares = torch.rand(20, 2)
    here = torch.where(ids == 3, 0, ids)
    result = runner.run(x, Choice(ids, shares), packed)
    assert torch.equal(result, runner.run(x, Choice(here, torch.where(ids == 3, 0.0, shares)), packed))
    assert not runner.run(x, Choice(torch.full_like(ids, 3), shares), packed).any()


def runner_of(kernels: Kernels, dtype: torch.dtype) -> CpuExperts:
    from srt.layers.quant.plain import Plain

    return CpuExperts(Plain(dtype), kernels)


def one_hot(name: str, codes: Tensor, scale: float) -> tuple[StoredExperts, ExpertShape]:
    """One expert whose down matrix is these [H, 128] codes under this scale; an input of 8 in column 0, and nothing
    else, activates column 0 alone."""
    hidden = codes.shape[0]
    weights = FORMATS[name]
    gate_up = weights.pack(torch.zeros(1, 256, hidden))
    down = dict(weights.pack(torch.zeros(1, hidden, 128)).tensors)
    if name == "fp8":
        down["weight"] = codes.view(1, hidden, 128).view(E4M3)
        down[BLOCK_SCALE] = torch.full_like(down[BLOCK_SCALE], scale)
    else:
        down["weight"] = pack_nibbles(codes).view(1, hidden, 64)
        down[GROUP_SCALE] = torch.ones_like(down[GROUP_SCALE].float()).to(E4M3)
        down[MATRIX_SCALE] = torch.full_like(down[MATRIX_SCALE], scale)
    shape = ExpertShape(1, hidden, 128, None)
    # Row 0 of gate and of up is 1 in column 0: an input with 8 and then nothing has one activation that is not zero.
    plain = torch.zeros(1, 256, hidden)
    plain[:, 0, 0], plain[:, 128, 0] = 1, 1
    halves = [weights.pack(plain[:, :128]), weights.pack(plain[:, 128:])]
    joined = {key: torch.cat([half.tensors[key] for half in halves], dim=1) for key in halves[0].tensors}
    stored = StoredExperts(StoredWeight(gate_up.shape, joined), StoredWeight((1, hidden, 128), down))
    return stored, shape


@pytest.mark.parametrize("library", ["kernels", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_every_code_is_decoded_exactly(
    request: pytest.FixtureRequest, library: str, dtype: torch.dtype, name: str
) -> None:
    """All 256 bytes (all 16 nibbles, in the low and in the high half of their byte) as weights of one column each."""
    native: Kernels = request.getfixturevalue(library)
    count = 256 if name == "fp8" else 32
    every = torch.arange(256 if name == "fp8" else 16, dtype=torch.uint8).repeat(1 if name == "fp8" else 2)
    codes = torch.zeros(count, 128, dtype=torch.uint8)
    codes[torch.arange(count), 0 if name == "fp8" else torch.arange(count) // 16] = every
    stored, shape = one_hot(name, codes, 0.5)
    if name == "nvfp4":  # the second half of the rows holds its code in column 1, the byte's high nibble
        stored.gate_up.weight[:, [1, 129]] = stored.gate_up.weight[:, [0, 128]]
        for half in (0, 128):
            stored.gate_up.tensors[GROUP_SCALE].view(torch.uint8)[:, half + 1] = stored.gate_up.tensors[
                GROUP_SCALE
            ].view(torch.uint8)[:, half]
    runner = CpuExperts(FORMATS[name], native)
    packed: PackedExperts = runner.pack(stored, shape)
    x = torch.zeros(1, count, dtype=dtype)
    x[0, 0] = 8.0
    found = runner.run(x, Choice(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)), packed)[0]
    value = every.view(E4M3).float() if name == "fp8" else FORMATS[name].unpack(stored.down)[0].sum(-1) * 2
    activation = (torch.nn.functional.silu(torch.tensor(8.0)) * 8.0).to(dtype).float()
    torch.testing.assert_close(found, (value * activation * 0.5).to(dtype), equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_packed_codes_take_the_bytes_that_they_have_on_disk(kernels: Kernels, name: str) -> None:
    shape = ExpertShape(4, 256, 256, None)
    stored = lopsided(FORMATS[name], shape)
    packed = CpuExperts(FORMATS[name], kernels).pack(stored, shape)
    held = sum(tensor.nbytes for tensor in packed.tensors.values())
    kept = [t for w in (stored.gate_up, stored.down) for key, t in w.tensors.items() if key != "input_scale"]
    assert held <= 1.01 * sum(tensor.nbytes for tensor in kept)


def _halves(packed: Tensor) -> Tensor:
    """Gate and up columns of every panel in each other's place."""
    return torch.cat(packed.split(16, dim=-2)[::-1], dim=-2)


MISTAKES: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "fp8 halves": ("fp8", "gate_up", _halves),
    "fp8 scales of halves": ("fp8", "gate_up.scales", lambda scales: scales.flip(-1)),
    "fp8 scales along K": ("fp8", "down.scales", lambda scales: scales.flip(-2)),
    "nvfp4 halves": ("nvfp4", "gate_up", _halves),
    "nvfp4 nibbles": ("nvfp4", "gate_up", lambda codes: (codes >> 4) | (codes << 4)),
    "nvfp4 scales of halves": ("nvfp4", "gate_up.scales", lambda scales: scales.flip(-1)),
    "nvfp4 group scales": ("nvfp4", "down.groups", lambda groups: groups.flip(2)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_layout_fails_the_comparison(kernels: Kernels, mistake: str) -> None:
    name, key, make = MISTAKES[mistake]
    weights, shape = FORMATS[name], ExpertShape(5, 256, 256, 0.6)
    stored, runner = lopsided(weights, shape), CpuExperts(weights, kernels)
    # Blocks of one row differ in scale, and not by the same factor in the next one.
    stored.down.tensors[BLOCK_SCALE if name == "fp8" else MATRIX_SCALE][..., :1] *= 3
    x, choice = random(9, 256), ragged_choice(9, 5, 3)
    packed, expected = runner.pack(stored, shape), truth(weights, stored, shape, x, choice)
    assert error(runner.run(x, choice, packed), expected) < 1e-5
    packed.tensors[key] = make(packed.tensors[key]).contiguous()
    assert not error(runner.run(x, choice, packed), expected) < 0.05
