"""What benchmarks on a GPU share: timing by replays of a graph, what figures depend on, lists of sizes."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch


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


def versions() -> dict[str, str]:
    """The GPU and the versions that figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
    return {"gpu": gpu, "torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton}


def integers(text: str) -> list[int]:
    """ "1,4,16" -> [1, 4, 16]; empty -> []."""
    return [int(part) for part in text.split(",") if part]
