"""Time a layer of routed experts with its shared one on a GPU, beside the least time that its bytes and products need.

    python -m benchmarks.moe --formats bf16,fp8,nvfp4 --tokens 1,8,64,512,4096 --output results.jsonl

Sizes are Step-3.7's unless told otherwise. Weights are random, experts are drawn uniformly, anew for each of the calls
that follow one another, so that no weight is found in a cache. A figure is the median of replays of a CUDA graph that
holds these calls, divided by their number. Before anything is timed, results are compared with the reference runner.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu import integers, seconds, versions
from benchmarks.report import append, context
from srt.layers.gpu import current_gpu
from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.moe.triton_experts import TritonExperts
from srt.layers.ops import Choice
from srt.layers.quant.contract import WEIGHT, StoredWeight, WeightFormat
from srt.layers.quant.fp8 import BLOCK_SCALE, Fp8Blocks
from srt.layers.quant.nvfp4 import GROUP_SCALE, MATRIX_SCALE, Nvfp4
from srt.layers.quant.plain import Plain

FORMATS: Final[dict[str, WeightFormat]] = {"bf16": Plain(), "fp8": Fp8Blocks(), "nvfp4": Nvfp4(inputs=False)}
BYTES: Final = {"bf16": 2.0, "fp8": 1.0 + 4 / 128**2, "nvfp4": 0.5625}
TOLERANCE: Final = {"bf16": 1e-2, "fp8": 2e-2, "nvfp4": 1e-2}
CHECKED_TOKENS: Final = (3, 40)
SHORT, LONG = 12, 2
"""Calls in a graph, for few tokens and for many."""


@dataclass(frozen=True)
class Layer:
    """The experts of one layer, routed and shared, packed for the runner."""

    name: str
    shape: ExpertShape
    top_k: int
    runner: TritonExperts
    stored: StoredExperts
    experts: PackedExperts
    shared: PackedExperts

    def choice(self, tokens: int) -> Choice:
        """Distinct experts of each token, uniformly drawn."""
        draws = torch.rand(tokens, self.shape.experts, device="cuda")
        weights = torch.rand(tokens, self.top_k, device="cuda") + 0.1
        return Choice(draws.topk(self.top_k, dim=-1).indices.int(), weights)

    def run(self, hidden: Tensor, choice: Choice) -> Tensor:
        """What a model's layer runs."""
        return self.runner.run_with_shared(hidden, lambda: choice, self.experts, self.shared)


def random_weight(name: str, shape: tuple[int, int, int], parts: int) -> StoredWeight:
    """A stack of weights of magnitude K^-0.5, as codes drawn at random: encoding so many would take minutes."""
    experts, rows, columns = shape
    weights, size = FORMATS[name], columns**-0.5
    tensors = {
        key: torch.empty(grid.shape(shape, parts), dtype=grid.dtype, device="cuda")
        for key, grid in weights.grids().items()
    }
    for expert in range(experts):
        main = tensors[WEIGHT][expert]
        if name == "nvfp4":
            main.random_(0, 256)
            tensors[GROUP_SCALE][expert] = (torch.rand(rows, columns // 16, device="cuda") + 0.5).to(
                torch.float8_e4m3fn
            )
        else:
            main.copy_(torch.randn(rows, columns, device="cuda") * (size if name == "bf16" else 64.0))
    if name == "fp8":
        tensors[BLOCK_SCALE].uniform_(0.5 * size / 64, 1.5 * size / 64)
    if name == "nvfp4":
        tensors[MATRIX_SCALE].uniform_(0.2 * size, 0.4 * size)
    return StoredWeight(shape, tensors)


def build(name: str, args: argparse.Namespace) -> Layer:
    """A layer of the sizes that were asked for."""
    runner = TritonExperts(FORMATS[name], current_gpu())
    shape = ExpertShape(args.experts, args.hidden, args.width, args.limit)
    alone = ExpertShape(1, args.hidden, args.width, args.limit)
    refusal = runner.refuses(shape)
    if refusal is not None:
        raise SystemExit(f"{name}: {refusal}")
    stored, shared = (
        StoredExperts(
            random_weight(kind, (one.experts, 2 * one.width, one.hidden), 2),
            random_weight(kind, (one.experts, one.hidden, one.width), 1),
        )
        for kind, one in ((name, shape), ("bf16", alone))
    )
    packed, packed_shared = runner.pack(stored, shape), runner.pack_shared(shared, alone)
    return Layer(name, shape, args.top_k, runner, stored, packed, packed_shared)


def check(layer: Layer) -> float:
    """The largest relative error, by norm, of the routed experts. Ends the run if it is out of tolerance."""
    weights = FORMATS[layer.name]
    reference = ReferenceExperts(weights, coded=layer.name == "fp8")
    packed = reference.pack(layer.stored, layer.shape)
    worst = 0.0
    for tokens in CHECKED_TOKENS:
        hidden, choice = torch.randn(tokens, layer.shape.hidden, device="cuda").bfloat16(), layer.choice(tokens)
        expected = reference.run(hidden.float(), choice, packed)
        found = layer.runner.run(hidden, choice, layer.experts).float()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    if not worst < TOLERANCE[layer.name]:
        raise SystemExit(f"{layer.name}: relative error {worst:.2e}, tolerated are {TOLERANCE[layer.name]:.0e}")
    return worst


def measure(layer: Layer, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the result: time, bytes that had to move, floor, share of it."""
    calls = SHORT if tokens <= args.experts // args.top_k else LONG
    inputs = [torch.randn(tokens, layer.shape.hidden, device="cuda").bfloat16() for _ in range(calls)]
    choices = [layer.choice(tokens) for _ in range(calls)]
    touched = sum(int(choice.ids.unique().numel()) for choice in choices) / calls
    weights = 3 * layer.shape.hidden * layer.shape.width
    moved = touched * weights * BYTES[layer.name] + weights * BYTES["bf16"] + 2 * inputs[0].numel() * 2
    products = 2 * weights * tokens * (layer.top_k + 1)
    took = seconds(lambda number: layer.run(inputs[number], choices[number]), calls, args.replays)
    floor = max(moved / (args.bandwidth * 1e12), products / (args.matrix_rate * 1e12))
    return {
        "format": layer.name, "tokens": tokens, "touched_experts": round(touched, 1), "ms": round(took * 1e3, 4),
        "floor_ms": round(floor * 1e3, 4), "floor_percent": round(100 * floor / took, 1),
        "gb_per_s": round(moved / took / 1e9), "tflop_per_s": round(products / took / 1e12, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,fp8,nvfp4", help=f"of {', '.join(FORMATS)}")
    parser.add_argument(
        "--tokens", type=integers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument("--experts", type=int, default=288)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--limit", type=float, default=None, help="clamp of the activation")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of the floor")
    parser.add_argument("--matrix-rate", type=float, default=790.0, help="TFLOP/s of the floor (bf16)")
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to")
    args = parser.parse_args()
    if current_gpu() is None:
        raise SystemExit("benchmarks.moe needs a GPU")
    torch.manual_seed(1)
    results = []
    for name in args.formats.split(","):
        layer = build(name, args)
        worst = check(layer)
        for tokens in tqdm(args.tokens, desc=f"{name} (error {worst:.1e})"):
            results.append(measure(layer, tokens, args) | {"error": worst})
        del layer
        torch.cuda.empty_cache()
    print(f"{'format':<8}{'tokens':>7}{'ms':>10}{'floor':>10}{'%':>7}{'GB/s':>7}{'TFLOP/s':>9}")
    for line in results:
        shown = (
            "{format:<8}{tokens:>7}{ms:>10.4f}{floor_ms:>10.4f}{floor_percent:>7.1f}{gb_per_s:>7}{tflop_per_s:>9.1f}"
        )
        print(shown.format(**line))
    if args.output is not None:
        append(args.output, {"benchmark": "moe", **context(), **versions(), "results": results})


if __name__ == "__main__":
    main()
