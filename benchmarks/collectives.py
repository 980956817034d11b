"""Sums and gathers over the GPUs of one machine, checked and timed inside CUDA graphs, as decode steps use them.

usage: PYTHONPATH=. python benchmarks/collectives.py [--ranks 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srt.distributed import join_group

HIDDEN = 4096
TOKENS = (1, 4, 16, 64, 256, 2048)
REPEATS = 50


def work(rank: int, ranks: int, meeting: str) -> None:
    """One rank's part; rank 0 prints."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = join_group(rank, ranks, Path(meeting), device)
    if rank == 0:
        print(f"{ranks} x {torch.cuda.get_device_name()}: {group.describe()}")
    for tokens in TOKENS:
        parts = [part(seed, tokens, device) for seed in range(ranks)]
        x = parts[rank].clone()
        group.all_reduce(x)
        error = (x.float() - sum(one.float() for one in parts)).abs().max().item()
        gathered = group.all_gather(parts[rank])
        assert torch.equal(gathered, torch.cat(parts, dim=-1))
        everybody = [torch.empty_like(x) for _ in range(ranks)]
        torch.distributed.all_gather(everybody, x)
        assert all(torch.equal(one, x) for one in everybody), "ranks differ in their bits"
        microseconds = timed(lambda x=x: group.all_reduce(x))
        if rank == 0:
            print(f"all_reduce bf16 [{tokens:5}, {HIDDEN}]  {microseconds:8.1f} us  largest error {error:.3g}")
    torch.distributed.destroy_process_group()


def part(seed: int, tokens: int, device: torch.device) -> Tensor:
    """What a rank puts in."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=generator, device=device, dtype=torch.bfloat16)


def timed(run: object) -> float:
    """Microseconds of one call inside a graph of many."""
    assert callable(run)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    best = float("inf")
    for _ in range(5):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, begun.elapsed_time(ended) * 1000 / REPEATS)
    return best


def main() -> None:
    """Run all ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as meeting:
        spawn: Any = multiprocessing.get_context("spawn")
        children = [spawn.Process(target=work, args=(rank, ranks, meeting)) for rank in range(ranks)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
