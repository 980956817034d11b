"""The TRT-LLM-Gen adapter against the reference, through a stand-in with FlashInfer's signatures and layouts.

Tolerances are relative, by norm. NVFP4 and FP8: activations between the products that are rounded to a neighbouring
code (2e-2, 3e-3); bfloat16: two roundings (1e-2).
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from srt.layers.gpu import Gpu
from srt.layers.moe.contract import ExpertShape, StoredExperts
from srt.layers.moe.flashinfer import trtllm_kernels
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.moe.trtllm import TrtllmExperts
from srt.layers.moe.trtllm_layout import block_major, gated_rows, interleave_scales, rows_of, shuffled_rows
from srt.layers.ops import Choice
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import INPUT_SCALE, MATRIX_SCALE, REACH, Nvfp4
from srt.layers.quant.plain import Plain
from tests.layers.moe.support import error, lopsided, measured, ragged_choice, truth
from tests.support import trtllm
from tests.support.trtllm import standin

pytestmark = pytest.mark.usefixtures("on_a_cpu")

BLACKWELL = Gpu((10, 0))
FORMATS: dict[str, tuple[WeightFormat, int]] = {
    "bf16": (Plain(torch.bfloat16), 128),
    "fp8": (Fp8Blocks(), 128),
    "nvfp4": (Nvfp4(), 64),
}
TOLERANCE = {"bf16": 1e-2, "fp8": 3e-3, "nvfp4": 2e-2}
HIDDEN, EXPERTS, TOKENS, LIMIT = 256, 5, 7, 0.4
INSTALLED = importlib.util.find_spec("flashinfer") is not None
needs_flashinfer = pytest.mark.skipif(not INSTALLED, reason="compares with FlashInfer")


def case(name: str, limit: float | None, equal: bool = True) -> tuple[StoredExperts, ExpertShape, Tensor, Choice]:
    """Experts, their sizes, tokens, and what the tokens chose. With `equal`, gate and up have one matrix scale."""
    weights, width = FORMATS[name]
    shape = ExpertShape(EXPERTS, HIDDEN, width, limit)
    experts = lopsided(weights, shape)
    x, choice = torch.randn(TOKENS, HIDDEN).bfloat16(), ragged_choice(TOKENS, EXPERTS, 3)
    if name == "nvfp4":
        measured(experts, float(x.abs().max()) / REACH, 1.5 / REACH)
        if equal:
            scale = experts.gate_up.tensors[MATRIX_SCALE]
            scale.copy_(scale.amax(dim=-1, keepdim=True).expand_as(scale))
    return experts, shape, x, choice


def runner_of(name: str) -> TrtllmExperts:
    return TrtllmExperts(FORMATS[name][0], BLACKWELL, standin())


def expected_of(name: str, experts: StoredExperts, shape: ExpertShape, x: Tensor, choice: Choice) -> Tensor:
    """The reference in float32, with coded activations where the kernels code them."""
    if name != "nvfp4":
        return truth(experts, shape, FORMATS[name][0], x, choice)
    reference = ReferenceExperts(FORMATS[name][0], coded=True)
    return reference.run(x.float(), choice, reference.pack(experts, shape))


@pytest.mark.parametrize(
    ("name", "limit"), [("bf16", None), ("bf16", LIMIT), ("fp8", None), ("nvfp4", None), ("nvfp4", LIMIT)]
)
def test_what_the_kernels_are_handed_computes_the_experts(name: str, limit: float | None) -> None:
    experts, shape, x, choice = case(name, limit)
    runner = runner_of(name)
    assert runner.refuses(shape) is None
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert found.dtype is x.dtype
    assert error(found, expected_of(name, experts, shape, x, choice)) < TOLERANCE[name]


def test_a_gate_and_an_up_with_scales_of_their_own_keep_them_without_a_clamp() -> None:
    experts, shape, x, choice = case("nvfp4", None, equal=False)
    scale = experts.gate_up.tensors[MATRIX_SCALE]
    assert bool((scale[:, 0] != scale[:, 1]).all())
    runner = runner_of("nvfp4")
    found = runner.run(x, choice, runner.pack(experts, shape))
    assert error(found, expected_of("nvfp4", experts, shape, x, choice)) < TOLERANCE["nvfp4"]


def test_a_clamp_moves_both_halves_to_one_scale_and_says_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    experts, shape, x, choice = case("nvfp4", LIMIT, equal=False)
    runner = runner_of("nvfp4")
    with caplog.at_level(logging.WARNING):
        packed = runner.pack(experts, shape)
    assert "gate and up of 5 experts have different matrix scales" in caplog.text
    assert error(runner.run(x, choice, packed), expected_of("nvfp4", experts, shape, x, choice)) < 6e-2


@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_a_layer_without_a_clamp_does_not_get_the_default_one(name: str) -> None:
    experts, shape, x, choice = case(name, None)
    scale = experts.gate_up.tensors.get(MATRIX_SCALE, experts.gate_up.weight)
    scale.mul_(16.0)
    runner = runner_of(name)
    if name == "nvfp4":
        measured(experts, float(x.abs().max()) / REACH, 400.0 / REACH)
    expected = expected_of(name, experts, shape, x, choice)
    assert error(runner.run(x, choice, runner.pack(experts, shape)), expected) < TOLERANCE[name]
    seven = replace(shape, limit=7.0)
    assert error(runner.run(x, choice, runner.pack(experts, seven)), expected) > 0.2


@pytest.mark.parametrize("name", FORMATS)
def test_ranks_that_hold_other_experts_add_up_to_the_whole(name: str) -> None:
    """The scale of activations is the layer's: the largest input scale belongs to an expert of the second rank."""
    experts, shape, x, choice = case(name, None)
    whole = expected_of(name, experts, shape, x, choice)
    runner, total = runner_of(name), torch.zeros(TOKENS, HIDDEN)
    for first, count in ((0, 2), (2, 3)):
        local = replace(shape, experts=count, elsewhere=True)
        mine = StoredExperts(*(part_of(stored, first, count) for stored in (experts.gate_up, experts.down)))
        here = (choice.ids >= first) & (choice.ids < first + count)
        ids = torch.where(here, choice.ids - first, count)
        total += runner.run(x, Choice(ids, choice.weights), runner.pack(mine, local)).float()
    assert error(total, whole) < TOLERANCE[name]


def part_of(stored: StoredWeight, first: int, count: int) -> StoredWeight:
    """Some experts of a stack; input scales stay those of all."""
    tensors = {
        key: tensor if key == INPUT_SCALE else tensor[first : first + count] for key, tensor in stored.tensors.items()
    }
    return StoredWeight((count, *stored.shape[1:]), tensors)


def test_nvfp4_split_over_ranks_and_padded_adds_up_to_the_whole() -> None:
    """A width of 64 over four ranks: 16 each, padded to 64 with codes and scales of zero."""
    experts, shape, x, choice = case("nvfp4", None)
    whole = expected_of("nvfp4", experts, shape, x, choice)
    runner, total = runner_of("nvfp4"), torch.zeros(TOKENS, HIDDEN)
    for rank in range(4):
        gate_up = {key: tensor.clone() for key, tensor in experts.gate_up.tensors.items()}
        down = {key: tensor.clone() for key, tensor in experts.down.tensors.items()}
        mine = (torch.arange(64) // 16 == rank).repeat(2)
        for key in ("weight", "group_scale"):
            gate_up[key].view(torch.uint8)[:, ~mine] = 0
            columns = down[key].view(torch.uint8)
            columns[:, :, torch.arange(columns.shape[2]) * 4 // columns.shape[2] != rank] = 0
        part = StoredExperts(StoredWeight(experts.gate_up.shape, gate_up), StoredWeight(experts.down.shape, down))
        total += runner.run(x, choice, runner.pack(part, shape)).float()
    assert error(total, whole) < TOLERANCE["nvfp4"]


def swap(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def mistake(packed: dict[str, Tensor]) -> None:
        packed[first], packed[second] = packed[second], packed[first]

    return mistake


def change(key: str, do: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def mistake(packed: dict[str, Tensor]) -> None:
        packed[key] = do(packed[key])

    return mistake


MISTAKES: dict[str, tuple[str, float | None, Callable[[dict[str, Tensor]], None]]] = {
    "bf16 rows in order": ("bf16", None, change("down", lambda w: w[:, :, shuffled_rows(HIDDEN)])),
    "fp8 halves": ("fp8", None, change("gate_up", lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1))),
    "fp8 scales of halves": ("fp8", None, change("gate_up.scale", lambda s: s.flip(1))),
    "nvfp4 nibbles": ("nvfp4", None, change("gate_up", lambda w: (w >> 4) | (w << 4))),
    "nvfp4 scales not tiled": ("nvfp4", None, change("gate_up.scale", lambda s: trtllm.untiled(s))),
    "nvfp4 down rows": ("nvfp4", None, change("down", lambda w: w[:, shuffled_rows(HIDDEN)])),
    "nvfp4 scalars": ("nvfp4", None, swap("gate_factor", "up_factor")),
    "nvfp4 clamp of numbers": ("nvfp4", LIMIT, change("clamp", lambda c: torch.full_like(c, LIMIT))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_preparation_fails_the_comparison(mistake: str) -> None:
    name, limit, make = MISTAKES[mistake]
    experts, shape, x, choice = case(name, limit)
    runner = runner_of(name)
    packed, expected = runner.pack(experts, shape), expected_of(name, experts, shape, x, choice)
    assert error(runner.run(x, choice, packed), expected) < TOLERANCE[name]
    make(packed.tensors)
    assert not error(runner.run(x, choice, packed), expected) < 0.1


def test_the_shared_expert_and_an_empty_batch_go_through_as_well() -> None:
    experts, shape, x, choice = case("bf16", LIMIT)
    alone = ExpertShape(1, HIDDEN, 48, 0.3)
    shared = lopsided(Plain(torch.bfloat16), alone)
    runner = runner_of("bf16")
    packed, packed_shared = runner.pack(experts, shape), runner.pack_shared(shared, alone)
    one = Choice(torch.zeros(TOKENS, 1, dtype=torch.int32), torch.ones(TOKENS, 1))
    expected = expected_of("bf16", experts, shape, x, choice) + truth(shared, alone, Plain(), x, one)
    assert error(runner.run_with_shared(x, lambda: choice, packed, packed_shared), expected) < 1e-2
    nothing = Choice(choice.ids[:0], choice.weights[:0])
    assert runner.run(x[:0], nothing, packed).shape == (0, HIDDEN)


def test_refusals_name_what_is_in_the_way() -> None:
    shape = ExpertShape(4, 256, 128, None)
    refused = {
        "needs a GPU of the SM100 family, this is SM90": TrtllmExperts(Nvfp4(), Gpu((9, 0)), standin()).refuses(shape),
        "needs a GPU of the SM100 family, this is SM120": TrtllmExperts(Nvfp4(), Gpu((12, 0)), standin()).refuses(
            shape
        ),
        "needs a GPU of the SM100 family, this is none": TrtllmExperts(Nvfp4(), None, standin()).refuses(shape),
        "no kernels for nvfp4-a16 weights, only for bf16, fp8, nvfp4": TrtllmExperts(
            Nvfp4(inputs=False), BLACKWELL, standin()
        ).refuses(shape),
        "a hidden size of 128 does not divide by 256": runner_of("bf16").refuses(replace(shape, hidden=128)),
        "FP8 blocks have no activation that clamps after silu (limit 7)": runner_of("fp8").refuses(
            replace(shape, limit=7.0)
        ),
    }
    assert [said for said, found in refused.items() if said != found] == []


@needs_flashinfer
@pytest.mark.parametrize(
    "name", ["trtllm_bf16_routed_moe", "trtllm_fp8_block_scale_routed_moe", "trtllm_fp4_block_scale_routed_moe"]
)
def test_the_stand_in_has_the_signature_of_the_installed_flashinfer(name: str) -> None:
    moe = importlib.import_module("flashinfer.fused_moe")

    def form(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(one.name, one.kind, one.default) for one in parameters]

    assert form(getattr(trtllm, name)) == form(getattr(moe, name))


@needs_flashinfer
def test_the_numbers_of_enums_are_those_of_the_installed_flashinfer() -> None:
    kernels = trtllm_kernels()
    assert (kernels.swiglu, kernels.swiglu_step, kernels.linear_scales) == (
        trtllm.SWIGLU,
        trtllm.SWIGLU_STEP,
        trtllm.LINEAR,
    )


@needs_flashinfer
def test_rows_are_ordered_as_by_flashinfers_own_helpers() -> None:
    core = importlib.import_module("flashinfer.fused_moe.core")
    for width in (64, 192, 320, 1280):
        up_first = torch.cat((torch.arange(width) + width, torch.arange(width)))
        like = torch.zeros(2 * width, 16, dtype=torch.uint8)
        for scales in (None, 16):
            order = core._maybe_get_cached_w3_w1_permute_indices({}, like, 128, num_elts_per_sf=scales)
            assert torch.equal(up_first[order], gated_rows(width))
        assert torch.equal(core.get_w2_permute_indices_with_cache({}, like, 128), shuffled_rows(2 * width))


@needs_flashinfer
def test_bf16_weights_are_laid_out_as_by_flashinfers_own_preparation() -> None:
    prepare = importlib.import_module("flashinfer.fused_moe.prepare")
    gate_up, down = torch.randn(2, 256, 256).bfloat16(), torch.randn(2, 256, 128).bfloat16()
    gate, up = gate_up.chunk(2, dim=1)
    expected = prepare.prepare_trtllm_bf16_weights(
        torch.cat((up, gate), dim=1), down, num_local_experts=2, hidden_size=256, intermediate_size=128
    )
    assert torch.equal(block_major(rows_of(gate_up, gated_rows(128))), expected["gemm1_weights"])
    assert torch.equal(block_major(rows_of(down, shuffled_rows(256))), expected["gemm2_weights"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_flashinfer
def test_scales_are_tiled_as_by_flashinfers_own_kernel() -> None:
    flashinfer = importlib.import_module("flashinfer")
    scales = torch.randint(0, 256, (3, 256, 20), dtype=torch.uint8, device="cuda")
    expected = flashinfer.block_scale_interleave(scales).reshape(scales.shape)
    assert torch.equal(interleave_scales(scales), expected)
