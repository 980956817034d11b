"""The Triton runner against the reference runner: in the interpreter, or on the GPU where there is one.

Tolerances are relative, by norm, against float32. float32: sums in another order (1e-5), and an activation that is
rounded to the neighbouring FP8 code (5e-3). bfloat16: inner activations and outputs are rounded to 8 bits (1e-2); with
FP8, more of them end at a neighbouring code (2e-2).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srt.layers.gpu import Gpu
from srt.layers.moe.contract import ExpertShape, PackedExperts
from srt.layers.moe.triton_experts import BY_ITSELF, LEAST_STEP, TritonExperts, encode, schedule
from srt.layers.moe.triton_packing import BITS, FOLDED, encode_scales, encode_words
from srt.layers.moe.triton_tiles import dense_tiles, for_float32, tiles_for
from srt.layers.ops import Choice
from srt.layers.quant.codes import pack_nibbles
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks, encode_tokens
from srt.layers.quant.nvfp4 import Nvfp4, unscaled_groups
from srt.layers.quant.plain import Plain
from tests.layers.moe.support import DEVICE, error, lopsided, ragged_choice, truth

HOPPER = Gpu((9, 0))
FORMATS: dict[str, tuple[WeightFormat, int, int]] = {
    "bf16": (Plain(torch.bfloat16), 72, 40),
    "fp32": (Plain(torch.float32), 72, 40),
    "fp8": (Fp8Blocks(), 256, 128),
    "nvfp4": (Nvfp4(), 128, 64),
}
TOLERANCE = {
    ("bf16", torch.bfloat16): 1e-2,
    ("fp32", torch.float32): 1e-5,
    ("fp8", torch.float32): 5e-3,
    ("fp8", torch.bfloat16): 2e-2,
    ("nvfp4", torch.float32): 1e-5,
    ("nvfp4", torch.bfloat16): 1e-2,
}
LIMIT = 0.3
SHARED_BYTES = 227 << 10
"""That a program may have on Hopper."""


def runner_of(weights: WeightFormat) -> TritonExperts:
    return TritonExperts(weights, HOPPER)


@pytest.mark.parametrize("limit", [None, LIMIT, 0.4])
@pytest.mark.parametrize(("name", "dtype"), TOLERANCE)
def test_experts_equal_the_reference_with_and_without_a_clamp(
    name: str, dtype: torch.dtype, limit: float | None
) -> None:
    weights, hidden, width = FORMATS[name]
    shape = ExpertShape(6, hidden, width, limit)
    experts, choice = lopsided(weights, shape), ragged_choice(37, 6, 2)
    x = torch.randn(37, hidden, device=DEVICE).to(dtype)
    runner = runner_of(weights)
    assert runner.refuses(shape) is None
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert found.dtype is dtype
    assert error(found, truth(experts, shape, weights, x, choice)) < TOLERANCE[name, dtype]


@pytest.mark.parametrize("tokens", [1, 5, 60, 150])
@pytest.mark.parametrize(("hidden", "width"), [(512, 256), (384, 320), (192, 768)])
def test_nvfp4_weights_are_found_whatever_the_size_of_their_blocks(tokens: int, hidden: int, width: int) -> None:
    shape = ExpertShape(4, hidden, width, LIMIT)
    experts, choice = lopsided(Nvfp4(), shape), ragged_choice(tokens, 4, 2)
    x = torch.randn(tokens, hidden, device=DEVICE)
    runner = runner_of(Nvfp4())
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert error(found, truth(experts, shape, Nvfp4(), x, choice)) < TOLERANCE["nvfp4", torch.float32]


@pytest.mark.parametrize("name", ["fp32", "fp8", "nvfp4"])
def test_a_limit_that_binds_changes_the_result_and_so_does_clamping_before_silu(name: str) -> None:
    weights, hidden, width = FORMATS[name]
    clamped, free = (ExpertShape(6, hidden, width, limit) for limit in (LIMIT, None))
    experts, choice = lopsided(weights, free), ragged_choice(9, 6, 2)
    x = torch.randn(9, hidden, device=DEVICE)
    runner = runner_of(weights)
    packed = runner.pack(experts, clamped)
    expected = truth(experts, clamped, weights, x, choice)
    assert error(runner.run(x, choice, packed), expected) < 5e-3
    assert error(runner.run(x, choice, PackedExperts(free, packed.tensors)), expected) > 0.2
    assert error(clamped_before_silu(x, choice, weights.unpack(experts.gate_up), weights.unpack(experts.down)),
                 expected) > 0.05  # fmt: skip


def clamped_before_silu(x: Tensor, choice: Choice, gate_up: Tensor, down: Tensor) -> Tensor:
    """The other convention, which must not pass for this one."""
    out = torch.zeros_like(x)
    for token, place in ((t, k) for t in range(x.shape[0]) for k in range(choice.ids.shape[1])):
        expert = int(choice.ids[token, place])
        gate, up = (gate_up[expert] @ x[token]).chunk(2)
        inner = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
        out[token] += choice.weights[token, place] * (down[expert] @ inner)
    return out


@pytest.mark.parametrize("tokens", [1, 3, 9, 16, 17, 90, 120])
@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_any_number_of_tokens_is_computed(name: str, tokens: int) -> None:
    """With every tile for several tokens: NVFP4 is decoded in a way that takes the order of registers for granted."""
    weights, hidden, width = FORMATS[name]
    shape = ExpertShape(4, hidden, width, LIMIT)
    experts, choice = lopsided(weights, shape), ragged_choice(tokens, 4, 3)
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    runner = runner_of(weights)
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert error(found, truth(experts, shape, weights, x, choice)) < 1e-2


@pytest.mark.parametrize(("name", "dtype"), [key for key in TOLERANCE if key[0] != "fp32"])
def test_one_token_among_many_experts_is_computed_by_programs_that_share_its_columns(
    name: str, dtype: torch.dtype
) -> None:
    weights, shape = FORMATS[name][0], ExpertShape(36, 512, 128, LIMIT)
    experts, choice = lopsided(weights, shape), ragged_choice(1, 36, 4)
    x = torch.randn(1, 512, device=DEVICE).to(dtype)
    tile = tiles_for(0 if name == "bf16" else 1 if name == "fp8" else 2, 4, 36, hopper=True).gate_up
    assert (tile.shares > 1) == (name == "nvfp4") and 512 % (tile.shares * tile.step) == 0
    runner = runner_of(weights)
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert error(found, truth(experts, shape, weights, x, choice)) < TOLERANCE[name, dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="records a CUDA graph")
@pytest.mark.parametrize("tokens", [1, 4, 5, 40, 700])
@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4"])
def test_a_recorded_graph_waits_for_nothing_and_gives_what_running_gives(name: str, tokens: int) -> None:
    weights, shape, alone = FORMATS[name][0], ExpertShape(64, 512, 128, LIMIT), ExpertShape(1, 512, 128, 0.4)
    runner = runner_of(weights)
    packed = runner.pack(lopsided(weights, shape), shape)
    shared = runner.pack_shared(lopsided(Plain(torch.bfloat16), alone), alone)
    x, choice = torch.randn(tokens, 512, device=DEVICE).bfloat16(), ragged_choice(tokens, 64, 4)
    runner.run_with_shared(x, lambda: choice, packed, shared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A call that waits for the GPU ends the recording with an error.
    with torch.cuda.graph(graph):
        found = runner.run_with_shared(x, lambda: choice, packed, shared)
    for _ in range(3):
        another = ragged_choice(tokens, 64, 4)
        choice.ids.copy_(another.ids)
        choice.weights.copy_(another.weights)
        x.normal_()
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, runner.run_with_shared(x, lambda: choice, packed, shared))


@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4"])
def test_no_tokens_give_no_rows(name: str) -> None:
    weights, hidden, width = FORMATS[name]
    shape = ExpertShape(4, hidden, width, LIMIT)
    runner = runner_of(weights)
    x, ids = torch.empty(0, hidden, device=DEVICE).bfloat16(), torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    packed = runner.pack(lopsided(weights, shape), shape)
    assert runner.run(x, Choice(ids, ids.float()), packed).shape == (0, hidden)


@pytest.mark.parametrize("name", ["fp32", "fp8", "nvfp4"])
def test_experts_of_other_ranks_add_nothing(name: str) -> None:
    weights, hidden, width = FORMATS[name]
    shape = ExpertShape(3, hidden, width, LIMIT, elsewhere=True)
    experts, choice = lopsided(weights, shape), ragged_choice(21, 6, 4)
    local = Choice(choice.ids.clamp(max=3), choice.weights)
    x = torch.randn(21, hidden, device=DEVICE)
    runner = runner_of(weights)
    found = runner.run(x, local, runner.pack(experts, shape))
    assert error(found, truth(experts, shape, weights, x, local)) < 5e-3


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 512), (3, 72), (11, 72), (70, 72)])
def test_the_shared_expert_is_added_before_the_one_rounding(tokens: int, hidden: int) -> None:
    weights = Plain(torch.bfloat16)
    shape, alone = ExpertShape(4, hidden, 40, LIMIT), ExpertShape(1, hidden, 24, 0.4)
    experts, shared, choice = lopsided(weights, shape), lopsided(weights, alone), ragged_choice(tokens, 4, 2)
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    runner = runner_of(weights)
    found = runner.run_with_shared(x, lambda: choice, runner.pack(experts, shape), runner.pack_shared(shared, alone))
    one = Choice(torch.zeros(tokens, 1, dtype=torch.int32, device=DEVICE), torch.ones(tokens, 1, device=DEVICE))
    expected = truth(experts, shape, weights, x, choice) + truth(shared, alone, weights, x, one)
    assert error(found, expected) < 1e-2


def halves_swapped(packed: dict[str, Tensor]) -> None:
    for key in ("gate_up.weight", "gate_up.scale", "gate_up.matrix"):
        if packed[key].numel():
            rows = -2 if packed[key].dim() > 2 else 1
            packed[key] = torch.cat(packed[key].chunk(2, dim=rows)[::-1], dim=rows)


def matrix_scales_swapped(packed: dict[str, Tensor]) -> None:
    packed["gate_up.matrix"] = packed["gate_up.matrix"].flip(1).contiguous()


def nibbles_swapped(packed: dict[str, Tensor]) -> None:
    packed["down.weight"] = (packed["down.weight"] >> 4) | (packed["down.weight"] << 4)


def group_scales_transposed(packed: dict[str, Tensor]) -> None:
    scale = packed["gate_up.scale"]
    packed["gate_up.scale"] = scale.view(torch.uint8).flip(-1).contiguous().view(scale.dtype)


def block_scales_inverted(packed: dict[str, Tensor]) -> None:
    packed["down.scale"] = 1.0 / packed["down.scale"]


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("fp32", halves_swapped),
        ("fp8", halves_swapped),
        ("fp8", block_scales_inverted),
        ("nvfp4", halves_swapped),
        ("nvfp4", matrix_scales_swapped),
        ("nvfp4", nibbles_swapped),
        ("nvfp4", group_scales_transposed),
    ],
)
def test_a_mistake_in_the_layout_fails_the_comparison(name: str, mistake: Callable[[dict[str, Tensor]], None]) -> None:
    weights, hidden, width = FORMATS[name]
    shape = ExpertShape(4, hidden, width, None)
    experts, choice = lopsided(weights, shape), ragged_choice(8, 4, 2)
    x = torch.randn(8, hidden, device=DEVICE)
    runner = runner_of(weights)
    packed, expected = runner.pack(experts, shape), truth(experts, shape, weights, x, choice)
    assert error(runner.run(x, choice, packed), expected) < 5e-3
    mistake(packed.tensors)
    assert error(runner.run(x, choice, packed), expected) > 0.1


def test_activations_are_encoded_to_the_same_bits_as_by_the_reference() -> None:
    x = torch.randn(13, 384, device=DEVICE) * torch.logspace(-30, 30, 13, device=DEVICE)[:, None]
    x[3], x[5, 128:256] = 0.0, 0.0
    for values in (x, x.bfloat16(), torch.randn(9, 512, device=DEVICE)[:, 100:356]):
        codes, scale = encode(values, BY_ITSELF)
        for expected_codes, expected_scale in (encode_tokens(values), encode_tokens(values.cpu())):
            assert torch.equal(scale.cpu(), expected_scale.cpu())
            assert torch.equal(codes.cpu().view(torch.uint8), expected_codes.cpu().view(torch.uint8))


@pytest.mark.parametrize(("repeats", "block"), [(1, 64), (2, 128), (4, 256)])
def test_words_and_scales_of_every_code_and_every_scale_decode_to_the_same_numbers(repeats: int, block: int) -> None:
    scales = torch.arange(127, dtype=torch.uint8)
    raw = torch.cat([scales, scales | 0x80])[:252].view(1, 1, 252).to(DEVICE)
    codes = torch.arange(252 * 16, device=DEVICE).view(1, 1, -1).remainder(16).to(torch.uint8)
    codes[..., 16 * 126 :] = codes[..., 16 * 126 :].flip(-1)
    codes, group = codes.repeat(2, 3, repeats), raw.repeat(2, 3, repeats).view(torch.float8_e4m3fn)
    codes[1, 2] = codes[1, 2].flip(-1)
    words, packed = encode_words(pack_nibbles(codes), group)
    assert words.shape[-1] * 4 == packed.shape[-1] * 64 == block
    found = torch.stack([decoded(words, packed, place) for place in range(4)], dim=-3).flatten(-3)
    assert torch.equal(found.transpose(1, 2).flatten(-2), unscaled_groups(codes, group))


def decoded(words: Tensor, scales: Tensor, place: int) -> Tensor:
    """What the kernels make of place `place` of every word, in float32: [.., B / 64, 16]."""
    pairs = words.view(torch.int32).long()[..., None] & 0xFFFFFFFF
    odd = torch.tensor([0, 16], device=words.device)
    from_to = zip(BITS[place], (15, 8, 7, 6), strict=True)
    bits = torch.stack([(pairs >> (where + odd) % 32 & 1) << to for where, to in from_to]).sum(0).int()
    bits = bits.flatten(-2).unflatten(-1, (-1, 16))
    raw = scales.long() & 0xFFFFFFFF
    byte = ((raw | raw << 32) >> (4 + 8 * place)).int() & 0xFF
    scale = (byte << 4 | 0x7000)[..., None]
    values: Tensor = (bits << 16).view(torch.float32) * (scale << 16).view(torch.float32) * FOLDED
    return values


def test_a_group_scale_that_is_no_number_is_refused() -> None:
    scale = torch.full((1, 1, 4), 0x7F, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="not a number"):
        encode_scales(scale)


@pytest.mark.parametrize("pairs", [0, 1, 8, 100, 2_000, 10_000, 20_000, 70_000])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_number_of_pairs_has_tiles_whose_steps_fit_the_format(kind: int, pairs: int) -> None:
    tiles, elsewhere = (tiles_for(kind, pairs, 288, hopper) for hopper in (True, False))
    assert not elsewhere.gate_up.tma and not elsewhere.down.tma
    for tile in (tiles.gate_up, tiles.down):
        assert 128 % tile.columns == 0 or kind != 1, "an FP8 scale belongs to 128 outputs"
        assert tile.step % {0: 16, 1: 128, 2: 64}[kind] == 0
        assert kind != 1 or tile.step == 128
        assert kind != 2 or not tile.tma, "words lie in blocks, which descriptors do not know"


@pytest.mark.parametrize("pairs", [1, 8, 100, 2_000, 10_000, 70_000])
def test_tiles_of_float32_fit_into_the_memory_of_a_multiprocessor(pairs: int) -> None:
    plain = tiles_for(0, pairs, 288, True), dense_tiles(pairs, True)
    for tiles in (for_float32(one, LEAST_STEP[0]) for one in plain):
        for tile, matrices in ((tiles.gate_up, 2), (tiles.down, 1)):
            assert tile.stages * (matrices * tile.columns + tiles.rows) * tile.step * 4 <= SHARED_BYTES
            assert tile.step % 16 == 0


@pytest.mark.parametrize("pairs", [1, 8, 20, 100, 2_000, 3_000, 12_000, 70_000])
def test_tiles_of_nvfp4_in_float32_fit_too_with_the_numbers_that_are_decoded(pairs: int) -> None:
    """Sums in float32 are not the matrix units': they read decoded weights from the same memory. What is counted here
    is what the compiler takes: stages but one, and one matrix decoded."""
    tiles = for_float32(tiles_for(2, pairs, 288, True), LEAST_STEP[2])
    for tile, matrices in ((tiles.gate_up, 2), (tiles.down, 1)):
        weights = matrices * tile.columns * (tile.step // 2 + tile.step // 16)
        decoded = tile.columns * (tile.step if tile.joined else tile.step // 4) * 4
        assert (tile.stages - 1) * (weights + tiles.rows * tile.step * 4) + decoded <= SHARED_BYTES
        assert tile.step % 64 == 0


@pytest.mark.parametrize("tokens", [1, 7, 60, 900, 1500])
@pytest.mark.parametrize("rows", [16, 32])
def test_every_pair_is_scheduled_once_in_order_and_with_pairs_of_its_expert(tokens: int, rows: int) -> None:
    ids = ragged_choice(tokens, 9, 3).ids.clamp(max=7)
    plan = schedule(ids, 7, rows, BY_ITSELF)
    flat, seen = ids.flatten(), list[int]()
    for expert, row in zip(plan.block_expert.tolist(), plan.block_row.tolist(), strict=True):
        if expert < 7:
            mine = plan.order[row : min(row + rows, int(plan.starts[expert + 1]))].tolist()
            assert mine and {int(flat[pair]) for pair in mine} == {expert}
            seen += mine
    assert seen == [pair for expert in range(7) for pair in range(flat.numel()) if flat[pair] == expert]


def test_what_cannot_be_computed_is_refused_with_the_number_at_fault() -> None:
    shape = ExpertShape(4, 96, 64, 7.0)
    assert TritonExperts(Plain(), None).refuses(shape) == "needs a GPU"
    assert runner_of(Plain()).refuses(shape) is None
    assert runner_of(Fp8Blocks()).refuses(shape) == "a hidden size of 96 does not divide by 128"
    assert runner_of(Nvfp4()).refuses(shape) == "a hidden size of 96 does not divide by 64"
    assert TritonExperts(Nvfp4(), Gpu((8, 0))).refuses(shape) == "nvfp4 weights need SM89 or newer, this is SM80"


def test_weights_without_measured_inputs_run_all_the_same() -> None:
    weights, shape = Nvfp4(inputs=False), ExpertShape(3, 64, 64, None)
    experts, choice = lopsided(weights, shape), ragged_choice(5, 3, 2)
    assert isinstance(experts.gate_up, StoredWeight)
    x = torch.randn(5, 64, device=DEVICE)
    runner = runner_of(weights)
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert error(found, truth(experts, shape, weights, x, choice)) < 1e-5
