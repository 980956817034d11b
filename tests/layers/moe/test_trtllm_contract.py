"""All six TRT-LLM-Gen entry points: signatures on record, and weights that serve those that route themselves too."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srt.layers.moe.contract import ExpertShape
from srt.layers.moe.trtllm import TrtllmExperts
from srt.layers.ops import Choice, TorchOps
from srt.layers.quant.contract import WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import REACH, Nvfp4
from srt.layers.quant.plain import Plain
from tests.layers.moe.support import error, lopsided, measured
from tests.layers.moe.test_trtllm import BLACKWELL
from tests.support import trtllm, trtllm_whole

pytestmark = pytest.mark.usefixtures("on_a_cpu")

RECORD: dict[str, Any] = json.loads((Path(trtllm.__file__).parent / "trtllm_signatures.json").read_text())
ENTRY_POINTS = [name for name in RECORD if name.startswith("trtllm_")]
FORMATS: dict[str, WeightFormat] = {"bf16": Plain(torch.bfloat16), "fp8": Fp8Blocks(), "nvfp4": Nvfp4()}
FACTOR = 3.0


def recorded(name: str) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults of the parameters of an entry point."""
    kinds = (("positional", inspect.Parameter.POSITIONAL_OR_KEYWORD), ("keyword", inspect.Parameter.KEYWORD_ONLY))
    return [
        (one[0], kind, one[1] if len(one) > 1 else inspect.Parameter.empty)
        for key, kind in kinds
        for one in RECORD[name][key]
    ]


def form(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_stand_in_has_the_recorded_signature(name: str) -> None:
    assert form(vars(trtllm if "routed" in name else trtllm_whole)[name]) == recorded(name)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="compares with FlashInfer")
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_recorded_signature_is_that_of_the_installed_flashinfer(name: str) -> None:
    assert form(getattr(importlib.import_module("flashinfer.fused_moe"), name)) == recorded(name)


@dataclass
class Whole:
    """The entry points that route themselves, called with what the adapter hands to the routed ones."""

    logits: Tensor
    bias: Tensor

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            del arguments["topk_ids"]
            arguments |= {"routing_method_type": trtllm_whole.MINIMAX, "routed_scaling_factor": FACTOR}
            return function(routing_logits=self.logits, **arguments | {"routing_bias": self.bias})

        return call


@pytest.mark.parametrize(
    ("name", "limit"), [("bf16", None), ("bf16", 0.4), ("fp8", None), ("nvfp4", None), ("nvfp4", 0.4)]
)
def test_entry_points_that_route_themselves_compute_the_same_from_the_same_weights(
    name: str, limit: float | None
) -> None:
    torch.manual_seed(5)
    shape = ExpertShape(6, 256, 128, limit)
    experts = lopsided(FORMATS[name], shape, up_scale=1.0)
    if name == "nvfp4":
        experts = measured(experts, 8 / REACH, 4 / REACH)
    x = torch.randn(7, 256).bfloat16()
    gate, bias = torch.randn(6, 256) * 0.2, torch.randn(6) * 0.5
    ops = TorchOps()
    choice: Choice = ops.route(x, ops.pack_router(gate), bias, top_k=2, factor=FACTOR)
    kernels, whole = trtllm.standin(), Whole(x.float() @ gate.T, bias)
    own = replace(
        kernels,
        bf16=whole(trtllm_whole.trtllm_bf16_moe),
        fp8=whole(trtllm_whole.trtllm_fp8_block_scale_moe),
        fp4=whole(trtllm_whole.trtllm_fp4_block_scale_moe),
    )
    runner, other = (TrtllmExperts(FORMATS[name], BLACKWELL, one) for one in (kernels, own))
    packed = runner.pack(experts, shape)
    handed, routed = runner.run(x, choice, packed), other.run(x, choice, packed)
    assert 0 < error(routed, handed.float()) < 4e-3, "bfloat16 routing weights, and nothing else"
