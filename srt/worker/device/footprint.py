"""What a GPU's memory holds beside weights and KV, measured: rows, the largest step, the driver, recorded steps."""

from __future__ import annotations

import torch

from srt.worker.device.runner import DeviceRunner


def footprint(runner: DeviceRunner, chunk: int, drafts: int, free_bytes: int) -> dict[str, int]:
    """Bytes by part of the plan, after the largest batch of images and the largest step that may come; waits for the
    device.

    `free_bytes`: what was free before this process used the GPU. What others take meanwhile counts as the driver's;
    where they gave back more, nothing is told of the driver.
    """
    passes = runner.passes
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = _requested("current")
    with torch.inference_mode():
        runner.images.rehearse()
        passes.rehearse_largest(chunk, drafts)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    found = {
        "rows": passes.rows.bytes + passes.proposer.bytes,
        "largest step": _requested("peak") - before,
    }
    driver = free_bytes - free - torch.cuda.memory_reserved()
    return found | ({"driver": driver} if driver > 0 else {})


def _requested(which: str) -> int:
    """Bytes of all tensors, without what the allocator rounds them up to."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])
