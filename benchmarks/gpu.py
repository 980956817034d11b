"""What benchmarks on a GPU share: timing by replays of a graph, and what figures depend on."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton


def seconds(call: Callable[[int], Any], calls: int, replays: int) -> float:
    """Median time of a call out of `calls` different ones in a CUDA graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3 / calls)
    return statistics.median(times)


def gpu_context() -> dict[str, str]:
    """The GPU and the versions that figures depend on."""

    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": str(triton.__version__)}
    return {"gpu": torch.cuda.get_device_name()} | versions


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
