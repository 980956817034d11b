"""Which runner a layer gets, and what is said about the others."""

from __future__ import annotations

import pytest
import torch

from srt.errors import StartupError
from srt.layers.gpu import Gpu
from srt.layers.moe import backends
from srt.layers.moe.backends import Candidate, candidates, choose_runner
from srt.layers.moe.contract import rank_shape
from srt.layers.moe.flashinfer import FlashInferUnavailable
from srt.layers.moe.placement import Placement
from srt.layers.moe.trtllm import TrtllmExperts
from srt.layers.quant.contract import WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import Nvfp4
from srt.layers.quant.plain import Plain
from tests.support.trtllm import standin

CPU = Candidate("reference", "no compiler")
HOPPER, BLACKWELL = Gpu((9, 0)), Gpu((10, 0))
WHOLE = Placement(all_experts=8, first=0, experts=8, start=0, width=1280)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer as a stand-in with its signatures."""
    monkeypatch.setattr(backends, "trtllm_kernels", standin)


def choose(asked: str, weights: WeightFormat, gpu: Gpu | None, limit: float | None, hidden: int = 4096) -> str:
    chosen = choose_runner(candidates(asked, CPU, gpu), weights, WHOLE, hidden, limit)
    return f"{chosen.name} ({chosen.reason})"


def test_a_hopper_runs_every_format_in_triton_and_says_why_nothing_faster() -> None:
    for weights in (Plain(), Fp8Blocks(), Nvfp4()):
        assert choose("auto", weights, HOPPER, 7.0) == (
            "triton (flashinfer_trtllm: needs a GPU of the SM100 family, this is SM90; compiled for SM90)"
        )


def test_a_blackwell_runs_fp8_layers_with_a_clamp_in_triton_and_the_others_in_flashinfer(flashinfer: None) -> None:
    assert choose("auto", Fp8Blocks(), BLACKWELL, None) == "flashinfer_trtllm (fastest on SM100)"
    assert choose("auto", Fp8Blocks(), BLACKWELL, 7.0) == (
        "triton (flashinfer_trtllm: FP8 blocks have no activation that clamps after silu (limit 7); compiled for SM100)"
    )
    assert choose("auto", Nvfp4(), BLACKWELL, 7.0) == "flashinfer_trtllm (fastest on SM100)"


def test_a_blackwell_without_flashinfer_says_that_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FlashInferUnavailable("FlashInfer is not installed")

    monkeypatch.setattr(backends, "trtllm_kernels", missing)
    assert choose("auto", Nvfp4(), BLACKWELL, None).startswith("triton (flashinfer_trtllm: FlashInfer is not installed")
    with pytest.raises(StartupError, match="--moe-runner-backend flashinfer_trtllm: FlashInfer is not installed"):
        choose("flashinfer_trtllm", Nvfp4(), BLACKWELL, None)


def test_a_backend_that_was_asked_for_comes_first_and_gives_way_layer_by_layer(flashinfer: None) -> None:
    assert choose("triton", Nvfp4(), BLACKWELL, None) == "triton (as asked)"
    assert choose("flashinfer_trtllm", Plain(), BLACKWELL, None, hidden=320).startswith(
        "triton (flashinfer_trtllm: a hidden size of 320 does not divide by 256"
    )


def test_reference_means_reference_everywhere() -> None:
    for gpu in (None, HOPPER):
        assert choose("reference", Nvfp4(), gpu, 7.0) == "reference (as asked)"


@pytest.mark.parametrize("name", ["triton", "flashinfer_trtllm"])
def test_a_gpu_backend_that_is_asked_for_on_a_cpu_is_an_error(name: str) -> None:
    with pytest.raises(StartupError, match=f"--moe-runner-backend {name}: needs a GPU"):
        candidates(name, CPU, None)


def test_the_native_backend_that_is_asked_for_on_a_gpu_is_an_error() -> None:
    with pytest.raises(StartupError, match="--moe-runner-backend native: needs a CPU with a compiler"):
        candidates("native", CPU, HOPPER)


def test_nvfp4_over_eight_ranks_is_padded_to_whole_tiles() -> None:
    share = Placement(all_experts=288, first=0, experts=288, start=160, width=160)
    runner = TrtllmExperts(Nvfp4(), BLACKWELL, standin())
    assert rank_shape(runner, share, 4096, None).width == 192
    assert rank_shape(TrtllmExperts(Plain(torch.bfloat16), BLACKWELL, standin()), share, 4096, None).width == 256
