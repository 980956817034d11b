"""Time the draw of a step's tokens on a GPU: plain torch, which sorts, beside the kernels, which do not.

    python -m benchmarks.sampling --rows 1,8,64,256 --out results.jsonl

Logits are random, bfloat16, of the standard deviation that `--spread` names: with 3 top_p keeps some thousands of
tokens, with 1 or less most. A figure is the median of replays of a CUDA graph that holds some draws, divided by their
number. Before anything is timed, tokens of both are compared. They may differ where a number falls within the rounding
of a sum: one draw in a hundred, where there are a hundred thousand tokens to choose from.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import integers, seconds, versions
from benchmarks.report import append, context
from srt.layers.cuda.ops import TritonOps
from srt.layers.gpu import current_gpu
from srt.messages import RowStart, SamplingSpec
from srt.worker.device.fused_sampler import FusedSampler
from srt.worker.device.layout import layout_of
from srt.worker.device.rows import DeviceRows, DeviceStep
from srt.worker.device.sampler import RowSampling, Sampler, TorchSampler

SPECS: Final = {
    "largest": SamplingSpec(temperature=0.0),
    "temperature": SamplingSpec(temperature=0.8),
    "top_p": SamplingSpec(temperature=0.8, top_p=0.95),
    "top_p, sure": SamplingSpec(temperature=0.8, top_p=0.95),
    "top_k+top_p": SamplingSpec(temperature=0.8, top_k=50, top_p=0.95),
}
OUTSTANDING: Final = {"top_p, sure": 12.0}
"""By how much five logits of a row are raised, as a trained model's are that knows how to go on."""
CALLS: Final = 4
CHECKED: Final = 256
"""Rows whose tokens are compared."""
AGREEING: Final = 0.95


@dataclass(frozen=True)
class Work:
    """Rows of one kind with their logits."""

    logits: Tensor
    step: DeviceStep
    sampling: RowSampling

    def draw(self, sampler: Sampler, *, filtered: bool) -> Tensor:
        """Their tokens."""
        return sampler.sample(self.logits, self.step, self.sampling.settings, filtered=filtered)[0]


def work_of(name: str, rows: int, args: argparse.Namespace) -> Work:
    """Rows that sample as that entry says, each with a seed of its own."""
    spec = SPECS[name]
    device = torch.device("cuda")
    state = DeviceRows(device, 1, 64, 64, rows)
    state.state[:, :2] = torch.tensor([6, 7], device=device)
    sampling = RowSampling(device, rows)
    specs = [SamplingSpec(spec.temperature, spec.top_k, spec.top_p, spec.min_p, seed) for seed in range(rows)]
    sampling.apply([RowStart(row, b"", 0, 0, one) for row, one in enumerate(specs)])
    ones = np.ones(rows, np.int64)
    step = state.begin(layout_of(np.arange(rows), ones, ones.astype(np.bool_), ones * 0, device))
    logits = torch.randn(rows, args.vocabulary, device=device) * args.spread
    logits[:, 7:12] += OUTSTANDING.get(name, 0.0)
    return Work(logits.bfloat16(), step, sampling)


def check(name: str, plain: Sampler, kernels: Sampler, args: argparse.Namespace) -> float:
    """Share of rows that get the same token from both. Ends the run if they are few."""
    work = work_of(name, CHECKED, args)
    same = float((work.draw(plain, filtered=True) == work.draw(kernels, filtered=True)).float().mean())
    if same < AGREEING:
        raise SystemExit(f"{name}: only {same:.1%} of the kernels' tokens are those of torch")
    return same


def measure(name: str, rows: int, plain: Sampler, kernels: Sampler, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the result."""
    spec = SPECS[name]
    work, filtered = work_of(name, rows, args), spec.top_k > 0 or spec.top_p < 1.0
    ways = {
        "torch_us": lambda _: work.draw(plain, filtered=filtered),
        "kernels_us": lambda _: work.draw(kernels, filtered=filtered),
        # As where one other row has a filter.
        "beside_us": lambda _: work.draw(kernels, filtered=True),
    }
    return {"draw": name, "rows": rows} | {
        way: round(seconds(call, CALLS, args.replays) * 1e6, 1) for way, call in ways.items()
    }


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=integers, default=[1, 8, 64, 256], help="rows of a step (default 1,8,64,256)")
    parser.add_argument("--vocabulary", type=int, default=128_896, help="default %(default)s")
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of logits (default %(default)s)")
    parser.add_argument("--replays", type=int, default=9, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="append the result to this file of JSON lines")
    args = parser.parse_args()
    if current_gpu() is None:
        raise SystemExit("benchmarks.sampling needs a GPU")
    torch.manual_seed(1)
    print(f"{torch.cuda.get_device_name()}, {args.vocabulary} logits, spread {args.spread}, microseconds a draw")
    print(f"{'':<14}{'rows':>6}{'torch':>10}{'kernels':>10}{'beside filters':>16}{'same':>8}")
    gpu, results = current_gpu(), []
    plain, kernels = TorchSampler(TritonOps(gpu)), FusedSampler(gpu)
    with torch.inference_mode():
        for name in SPECS:
            same = check(name, plain, kernels, args)
            for rows in args.rows:
                one = measure(name, rows, plain, kernels, args) | {"same": same}
                results.append(one)
                print("{draw:<14}{rows:>6}{torch_us:>10}{kernels_us:>10}{beside_us:>16}{same:>8.3f}".format(**one))
    if args.out is not None:
        options = {"vocabulary": args.vocabulary, "spread": args.spread}
        append(args.out, {"benchmark": "sampling", **context(), **versions(), **options, "results": results})


if __name__ == "__main__":
    main()
